"""The least time that a step can take: each part's bytes and FLOPs against the ceilings of the GPU.

``ideal_s`` is what an engine would take that has no other cost than, one after another,
* every matrix product of the base (read its weights once, or multiply at the measured rate for that many rows),
* attention (read K and V of each row's context, write the new ones; or its FLOPs),
* the distinct adapters' A and B read once (or LoRA's FLOPs),
* LoRA's products added to outputs that lie in memory (one read and one write of each output),
* collectives, where there are several GPUs.
No launch, no gap, no latency; norms, rotary, activation function and sampling ride along with their neighbours. They
are priced as parts of their own and left out of ``ideal_s``. Parts do not overlap: the matrix units idle while KV is
read. An engine that fuses LoRA into its neighbours saves most of ``lora_outputs``, and can so come nearer to the ideal
than one that does not.

Pure and vectorised over steps. Called by ``bench``, by ``loraplex profile`` and, as an analytic profile, by simulator
and planner.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from loraplex.core.errors import BadConfig
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.ceilings import Ceilings, FloatArray
from loraplex.cost.stages import LayerCosts, stage_layers
from loraplex.cost.work import StepWork, step_work


class Part(StrEnum):
    GEMM = "gemm"
    """The seven projections of each layer."""
    LM_HEAD = "lm_head"
    ATTENTION = "attention"
    ADAPTERS = "adapters"
    LORA_OUTPUTS = "lora_outputs"
    COLLECTIVES = "collectives"
    ELEMENTWISE = "elementwise"
    SAMPLING = "sampling"


HIDDEN_PARTS = frozenset((Part.ELEMENTWISE, Part.SAMPLING))
"""What an ideal engine does on the way; not in ``ideal_s``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCost:
    """Over S steps; of one GPU of the stage. Arrays of shape (S,)."""

    num_bytes: FloatArray
    flops: FloatArray
    seconds: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCost:
    parts: Mapping[Part, PartCost]

    @property
    def ideal_s(self) -> FloatArray:
        """(S,) seconds, see the module."""
        return _sum(cost.seconds for part, cost in self.parts.items() if part not in HIDDEN_PARTS)

    @property
    def unfused_s(self) -> FloatArray:
        """(S,) seconds with every part on its own."""
        return _sum(cost.seconds for cost in self.parts.values())


def roofline(model: ModelSpec, work: StepWork, ceilings: Ceilings, *, itemsize: int = 2, tp: int = 1) -> RooflineCost:
    """One micro-batch through the whole model on ``tp`` GPUs. ``itemsize``: bytes of a weight, KV or activation."""
    return _stage(model, work, ceilings, itemsize=itemsize, tp=tp, num_layers=model.num_layers, first=True, last=True)


def stage_costs(
    model: ModelSpec, work: StepWork, ceilings: Ceilings, shape: Shape, *, itemsize: int = 2
) -> tuple[RooflineCost, ...]:
    """Per pipeline stage, layers cut as executors cut them. A step's latency is the sum of the stages, a full
    pipeline's pace is that of the slowest."""
    return tuple(
        _stage(
            model,
            work,
            ceilings,
            itemsize=itemsize,
            tp=shape.tp,
            num_layers=num_layers,
            first=stage == 0,
            last=stage == shape.pp - 1,
        )
        for stage, num_layers in enumerate(stage_layers(model, shape.pp))
    )


def decode_costs(
    model: ModelSpec, ceilings: Ceilings, *, tp: int = 1, rows: int = 32, context: int = 1024, itemsize: int = 2
) -> LayerCosts:
    """Seconds of a decode step of ``rows`` rows of ``context`` tokens by the roofline, without the exchange between
    stages."""
    ones = np.ones(rows, dtype=np.int64)
    work = step_work(
        model,
        step=0 * ones,
        start=context * ones,
        num_tokens=ones,
        samples=ones.astype(bool),
        adapter=-ones,
        sizes=(),
        num_steps=1,
    )
    whole = roofline(model, work, ceilings, itemsize=itemsize, tp=tp)
    head = float(whole.parts[Part.LM_HEAD].seconds[0])
    layer = (float(whole.ideal_s[0]) - head) / model.num_layers
    return LayerCosts(layers=(layer,) * model.num_layers, last=head)


def load_s(num_bytes: int, ceilings: Ceilings) -> float:
    """Seconds to copy ``num_bytes`` from pinned host memory, e.g. a cold adapter."""
    return num_bytes / ceilings.host_bytes_per_s


def _stage(
    model: ModelSpec,
    work: StepWork,
    ceilings: Ceilings,
    *,
    itemsize: int,
    tp: int,
    num_layers: int,
    first: bool,
    last: bool,
) -> RooflineCost:
    share = num_layers / model.num_layers
    tokens, none = work.num_tokens, np.zeros(len(work))
    d, i, q = model.hidden_size, model.intermediate_size / tp, model.q_size / tp
    # Where there are more shards than KV heads, heads are held more than once.
    kv = max(model.num_kv_heads / tp, 1) * model.head_dim
    rate = ceilings.flops_per_s(tokens)

    def cost(num_bytes: FloatArray, flops: FloatArray, flops_per_s: FloatArray = rate) -> PartCost:
        seconds = np.maximum(num_bytes / ceilings.copy_bytes_per_s, flops / flops_per_s)
        return PartCost(num_bytes=num_bytes, flops=flops, seconds=seconds)

    def gemm(weights: float, rows: FloatArray, count: int) -> PartCost:
        """``count`` products of ``weights`` elements each; none where there are no rows."""
        return cost(
            np.where(rows > 0, count * weights * itemsize, 0.0),
            2.0 * count * weights * rows,
            ceilings.flops_per_s(rows),
        )

    def lora_elements(sharded: FloatArray, replicated: FloatArray) -> FloatArray:
        return (sharded / tp + replicated) * share

    projections = [gemm(w, tokens, num_layers) for w in (d * (q + 2 * kv), q * d, 2 * d * i, i * d)]
    parts = {
        Part.GEMM: PartCost(
            num_bytes=_sum(p.num_bytes for p in projections),
            flops=_sum(p.flops for p in projections),
            seconds=_sum(p.seconds for p in projections),
        ),
        Part.ATTENTION: cost(
            (2.0 * num_layers * kv * itemsize) * (work.kv_read_tokens + tokens),
            4.0 * num_layers * q * work.attended_pairs,
        ),
        Part.ADAPTERS: cost(
            lora_elements(work.adapters.sharded, work.adapters.replicated) * itemsize,
            2.0 * lora_elements(work.lora.sharded, work.lora.replicated),
        ),
        Part.LORA_OUTPUTS: cost(
            2.0 * lora_elements(work.lora.sharded_outputs, work.lora.replicated_outputs) * itemsize, none
        ),
        # Two norms with their residual, rotary, attention's query and output, the gated activation.
        Part.ELEMENTWISE: cost(
            tokens * itemsize * (num_layers * (8 * d + 2 * (q + kv) + 2 * q + 3 * i) + (3 * d if first else 0)), none
        ),
        Part.COLLECTIVES: _collectives(model, tokens, ceilings, itemsize=itemsize, tp=tp, layers=num_layers, last=last),
    }
    if last:
        vocabulary = model.vocab_size / tp
        parts[Part.LM_HEAD] = gemm(d * vocabulary, work.num_sampled, 1)
        parts[Part.SAMPLING] = cost(2.0 * work.num_sampled * vocabulary * itemsize, none)
    return RooflineCost(parts=parts)


def _collectives(
    model: ModelSpec, tokens: FloatArray, ceilings: Ceilings, *, itemsize: int, tp: int, layers: int, last: bool
) -> PartCost:
    """Two ring all-reduces a layer, and the hidden states sent on to the next stage. BadConfig without a link."""
    hidden = tokens * model.hidden_size * itemsize
    reduces, sends = 2 * layers * (tp > 1), int(not last)
    none = np.zeros_like(hidden)
    if not reduces + sends:
        return PartCost(num_bytes=none, flops=none, seconds=none)
    if ceilings.link_bytes_per_s <= 0:
        raise BadConfig(f"{ceilings.name} has no link to other GPUs: tp and pp must be 1", param="shape")
    num_bytes = hidden * (reduces * 2 * (tp - 1) + sends) / tp
    seconds = num_bytes / ceilings.link_bytes_per_s + (reduces + sends) * ceilings.collective_s * (tokens > 0)
    return PartCost(num_bytes=num_bytes, flops=none, seconds=seconds)


def _sum(arrays: Iterable[FloatArray]) -> FloatArray:
    return np.asarray(sum(arrays), dtype=np.float64)
