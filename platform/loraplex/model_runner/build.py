"""From a model's name to a running executor: picks the source of spec and weights, sizes and allocates.

``model`` is a Hugging Face directory, a ``.gguf`` file, or ``random:NAME``. Called by replica, bench and tests.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch

from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.core.shape_check import check_shape
from loraplex.cost.stages import stage_layers
from loraplex.model_runner.arena import Arena, page_tokens, plan_num_pages
from loraplex.model_runner.checkpoints import read_checkpoint_spec, read_checkpoint_tensors
from loraplex.model_runner.config import ExecutorConfig
from loraplex.model_runner.executor import TorchExecutor
from loraplex.model_runner.executor_base import ExecutorBase
from loraplex.model_runner.peers import Peers
from loraplex.model_runner.random_models import random_spec, random_tensors
from loraplex.model_runner.rank_executor import RankExecutor, TokenSampler
from loraplex.model_runner.ranks.group_executor import GroupExecutor
from loraplex.model_runner.ranks.launcher import RankLauncher
from loraplex.model_runner.ranks.local import LocalLauncher
from loraplex.model_runner.sampler import Sampler
from loraplex.model_runner.shard import Shard, plan_shards
from loraplex.model_runner.weights import DecoderWeights, assemble_weights, tensors_elsewhere

RANDOM_PREFIX = "random:"
"""Of the names of models with random weights."""


def load_model_spec(model: str, base_model_id: BaseModelId) -> ModelSpec:
    """Shapes and constants, no weights. Raises BadConfig naming the file, or the architecture that is not supported."""
    if model.startswith(RANDOM_PREFIX):
        return random_spec(model.removeprefix(RANDOM_PREFIX), base_model_id)
    path = Path(model)
    if path.suffix == ".gguf":
        # The gguf package is needed for GGUF files alone.
        from loraplex.model_runner.gguf_weights import read_gguf_spec

        return read_gguf_spec(path, base_model_id)
    if not path.is_dir():
        raise BadConfig(f"{model}: no such model directory", param="model")
    return read_checkpoint_spec(path, base_model_id)


def load_weights(model: str, shard: Shard, *, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Reads or draws the rank's weights straight into their fused, packed form on ``device``. BadConfig."""
    with torch.inference_mode():
        tensors = _tensors(model, shard, dtype=dtype, device=device)
        return assemble_weights(shard, tensors, dtype=dtype, device=device, source=model)


def build_executor(
    config: ExecutorConfig,
    *,
    model: str,
    base_model_id: BaseModelId,
    sampler: Callable[[ModelSpec, torch.device], TokenSampler] | None = None,
    launcher: RankLauncher | None = None,
) -> ExecutorBase:
    """Loads ``model`` on ``config.device``, or on a group of ``tp`` x ``pp`` ranks, and allocates the arena. BadConfig
    when an option or the model is wrong; ExecutorLost when a rank dies meanwhile.

    ``sampler``: another one than ours, e.g. one that looks at the logits; of one rank only. ``launcher``: who starts
    the ranks; None: processes of this machine.
    """
    device = rank_device(config)
    dtype = rank_dtype(config, device)
    spec = load_model_spec(model, base_model_id)
    shape = Shape(tp=config.tp, pp=config.pp)
    if shape.num_ranks > 1:
        if sampler is not None:
            raise BadConfig("a sampler of one's own is for one rank", param="tp")
        return _build_group(config, shape, spec, model=model, device=device, dtype=dtype, launcher=launcher)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shard = Shard.whole(spec)
    weights = load_weights(model, shard, dtype=dtype, device=device)
    num_pages = plan_num_pages(config, spec, dtype=dtype, device=device)
    return build_rank(config, shard, weights, num_pages=num_pages, dtype=dtype, device=device, sampler=sampler)


def group_page_tokens(config: ExecutorConfig, spec: ModelSpec) -> int:
    """Tokens of a page on the ranks that ``build_executor`` gives the model ``spec``. Pure."""
    _, shards = _cut(config, spec)
    return page_tokens(config, [shard.local for shard in shards])


def build_rank(
    config: ExecutorConfig,
    shard: Shard,
    weights: DecoderWeights,
    *,
    num_pages: int,
    dtype: torch.dtype,
    device: torch.device,
    sampler: Callable[[ModelSpec, torch.device], TokenSampler] | None = None,
    peers: Peers | None = None,
) -> RankExecutor:
    """The executor of one rank, in this process. ``weights``: those of ``shard``; ``peers``: the other ranks, None
    where there are none. BadConfig."""
    spec = shard.model
    page_size = page_tokens(config, (shard.local,))
    arena = Arena(shard.local, num_pages=num_pages, page_size=page_size, dtype=dtype, device=device)
    draw = (sampler or Sampler)(spec, device)
    if device.type == "cpu":
        if config.batch_invariant:
            raise BadConfig("batch_invariant is for CUDA devices", param="batch_invariant")
        return TorchExecutor(
            shard,
            weights,
            arena,
            draw,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            peers=peers,
        )
    # Triton is there on CUDA machines alone.
    from loraplex.model_runner.gpu.executor import GpuExecutor

    executor = GpuExecutor(
        shard,
        weights,
        arena,
        draw,
        max_rows=config.max_rows,
        max_step_tokens=config.max_step_tokens,
        cuda_graphs=config.cuda_graphs,
        graph_patience=config.graph_patience,
        batch_invariant=config.batch_invariant,
        peers=peers,
    )
    executor.warm_up()
    return executor


def rank_device(config: ExecutorConfig, rank: int = 0) -> torch.device:
    """The device of a group's ``rank``: they lie one after the other from ``config.device`` on. Raises BadConfig when
    there is no such device."""
    name = config.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadConfig(f"device {name!r}: {error}", param="device") from error
    if device.type not in ("cpu", "cuda"):
        raise BadConfig(f"device {name!r} is not supported: cpu or cuda", param="device")
    if device.type == "cpu" and device.index is not None:
        raise BadConfig(f"device {name!r}: there is one CPU device, cpu", param="device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadConfig("device cuda: torch sees no CUDA device", param="device")
    if device.type == "cuda":
        device = torch.device("cuda", (device.index or 0) + rank)
        if device.index >= torch.cuda.device_count():
            raise BadConfig(f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices", param="device")
    return device


def rank_dtype(config: ExecutorConfig, device: torch.device) -> torch.dtype:
    """Of weights, KV, adapters and activations."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]


def _cut(config: ExecutorConfig, spec: ModelSpec) -> tuple[tuple[int, ...], tuple[Shard, ...]]:
    """Layers of each stage, and the ranks' parts."""
    cut = stage_layers(spec, config.pp) if config.stage_layers is None else config.stage_layers
    return cut, plan_shards(spec, Shape(tp=config.tp, pp=config.pp), cut)


def _build_group(
    config: ExecutorConfig,
    shape: Shape,
    spec: ModelSpec,
    *,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    launcher: RankLauncher | None,
) -> ExecutorBase:
    check_shape(spec, shape)
    if launcher is None:
        # All are of this machine.
        rank_device(config, shape.num_ranks - 1)
    if config.batch_invariant:
        raise BadConfig("batch_invariant is for one rank", param="batch_invariant")
    num_threads = config.num_threads or max(1, torch.get_num_threads() // shape.num_ranks)
    cut, shards = _cut(config, spec)
    # Ranks see their own part alone, and must not differ.
    page_size = page_tokens(config, [shard.local for shard in shards])
    return GroupExecutor(
        msgspec.structs.replace(config, stage_layers=cut, num_threads=num_threads, page_size=page_size),
        shards,
        model=model,
        itemsize=dtype.itemsize,
        launcher=launcher or LocalLauncher(),
    )


def _tensors(
    model: str, shard: Shard, *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    if model.startswith(RANDOM_PREFIX):
        # Every rank draws all of them, so that each gets the same numbers.
        return random_tensors(model.removeprefix(RANDOM_PREFIX), shard.model, dtype=dtype, device=device)
    if model.endswith(".gguf"):
        from loraplex.model_runner.gguf_weights import read_gguf_tensors

        return read_gguf_tensors(Path(model), shard.model)
    return read_checkpoint_tensors(Path(model), without=tensors_elsewhere(shard))
