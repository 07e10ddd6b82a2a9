"""How an executor runs: device, number format, arena size. Read by ``build_executor``, composed by ``config``."""

from typing import Annotated, Literal

import msgspec


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights, KV, adapters and activations. ``auto``: float32 on the CPU, bfloat16 elsewhere."""
    tp: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Shards that every layer is split into, each on a rank of its own: heads and intermediate columns must divide."""
    pp: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Stages that the layers are cut into, each on ``tp`` ranks; as many steps are in flight."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each stage; None: cut so that the slowest stage of a decode step is as fast as can be."""
    rank_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 8.0
    """A rank of a group that is silent for so long, or a step in which no rank ends half a layer for so long, ends the
    executor."""
    num_threads: int | None = None
    """Threads of one torch operation on the CPU; None leaves torch's own choice, shared out among the ranks of a
    group. Holds for the whole process."""
    page_size: int | None = None
    """Tokens of KV that one page holds. None: 16; on GPUs as many times more, up to 64, as it takes for a page to hold
    any matrix of an adapter of 64 ranks, which is then not cut."""
    num_pages: int | None = None
    """Pages of the arena; excludes ``arena_bytes``."""
    arena_bytes: int | None = None
    """Upper bound of the arena of a rank, rounded down to whole pages. With neither: 1 GiB on the CPU, elsewhere what
    ``memory_fraction`` leaves after the weights and the activations of the largest step."""
    memory_fraction: float = 0.9
    """Share of the accelerator's memory that weights, activations and arena may take together."""
    arena_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Part of the arena, however its size is given, that is this executor's: others share the accelerator."""
    reserved_bytes: tuple[int, ...] = ()
    """Of each accelerator of each stage: what weights and largest steps of others take there. With it the size of the
    arena follows from the whole memory, not from what happens to be free; without, the accelerators are ours alone."""
    max_rows: int = 256
    """Rows of a step, at most."""
    max_step_tokens: int = 8192
    """Tokens of a step, at most."""
    cuda_graphs: bool = True
    """Run decode steps as captured CUDA graphs; without, every kernel is launched by itself."""
    graph_patience: Annotated[int, msgspec.Meta(ge=0)] = 256
    """Times that a graph of a wider step serves a step that has none before the step gets its own. To run eagerly once
    and to be captured takes 0.1 s, a wider graph some tenths of a millisecond longer. 0: none, so that what a warm-up
    runs twice is captured there."""
    batch_invariant: bool = False
    """On CUDA: the logits of a request are the same bits whatever else runs, at some cost: other requests, adapters
    and their ranks, the order of the rows, the size of the step, graph or not. The request must be computed in the same
    chunks, which depend on the load where a prompt does not fit in one step or shares cached pages. Without a sliding
    window chunks of two tokens or more may be any; a token that is computed as a row of its own has other bits than in
    a chunk, so that a request that resumes after preemption has, too. Tokens follow the logits. Holds for one GPU
    type, number format and version of the software."""
