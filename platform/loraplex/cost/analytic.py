"""Profiles from arithmetic alone: the roofline of a step against the ceilings of a GPU, plus stated overheads.

To plan before anything was measured; marked ``source: analytic``. Makes the same kind of values as a fit over
measured steps. Called by ``profiler`` (which writes the shipped profiles with it) and by tests.
"""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from loraplex.core.adapter import AdapterBlock
from loraplex.core.errors import BadConfig
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.plan import Shape
from loraplex.core.shape_check import check_shape
from loraplex.cost.ceilings import Ceilings, FloatArray
from loraplex.cost.loads import Hop, LoadRates
from loraplex.cost.profile import BaseProfile, CostProfile, GpuProfile, StepProfile
from loraplex.cost.roofline import Part, RooflineCost, stage_costs
from loraplex.cost.stages import stage_layers
from loraplex.cost.step_cost import NUM_SCALARS, StepCoefficients, StepCost
from loraplex.cost.work import AdapterWork, StepWork

ALL_SHAPES = tuple(Shape(tp=tp, pp=pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4))

_KNOTS = (256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)
_REFERENCE_RANK = 16
_ROWS = 256.0


class Overheads(msgspec.Struct, frozen=True, kw_only=True):
    """What the roofline leaves out. Assumed, not measured."""

    efficiency: float = 0.9
    """Ideal time / time of a kernel at work."""
    step_s: float = 1e-4
    """Host's part of a step that nothing hides."""
    layer_s: float = 1e-5
    """Launches of a layer in a graph: eight kernels."""
    prefill_layer_s: float = 3e-5
    """More for a layer without a graph."""
    lora_layer_s: float = 1e-5
    """More for a layer with LoRA."""


ASSUMED = Overheads()


def analytic_step_cost(
    model: ModelSpec, ceilings: Ceilings, shape: Shape, *, itemsize: int = 2, overheads: Overheads = ASSUMED
) -> StepCost:
    """BadConfig when the GPU has no link and the shape needs one."""
    knots = _token_knots(ceilings, itemsize)
    probes = _Probes(model, knots)
    stages = []
    costs = stage_costs(model, probes.work, ceilings, shape, itemsize=itemsize)
    for cost, num_layers in zip(costs, stage_layers(model, shape.pp), strict=True):
        stages.append(_stage_coefficients(cost, probes, num_layers, itemsize=itemsize, overheads=overheads))
    host = np.zeros(NUM_SCALARS + 2 * len(knots))
    host[0] = overheads.step_s
    table = np.array(stages)
    latency = host + table.sum(axis=0)
    # Knots are the same in every stage.
    latency[NUM_SCALARS : NUM_SCALARS + len(knots)] = knots
    return StepCost(
        interval=StepCoefficients.from_array(host + table.max(axis=0)), latency=StepCoefficients.from_array(latency)
    )


def analytic_profile(
    models: Iterable[ModelSpec],
    ceilings: Ceilings,
    shapes: Sequence[Shape] = ALL_SHAPES,
    *,
    itemsize: int = 2,
    overheads: Overheads = ASSUMED,
) -> CostProfile:
    """Of one GPU type. Shapes that a base cannot take (heads or layers do not divide) are left out."""
    bases = tuple(BaseProfile(model=model, itemsize=itemsize) for model in models)
    note = (
        f"roofline of {ceilings.name} ({ceilings.source}); efficiency {overheads.efficiency}, "
        f"{overheads.layer_s * 1e6:.0f} us a layer assumed"
    )
    steps = tuple(
        StepProfile(
            base=base.name,
            gpu=ceilings.name,
            shape=shape,
            source="analytic",
            note=note,
            cost=analytic_step_cost(base.model, ceilings, shape, itemsize=itemsize, overheads=overheads),
        )
        for base in bases
        for shape in shapes
        if takes_shape(base.model, shape)
    )
    gpu = GpuProfile(
        name=ceilings.name,
        memory_bytes=ceilings.memory_bytes,
        loads=assumed_loads(ceilings.host_bytes_per_s),
        source="analytic",
    )
    return CostProfile(gpus=(gpu,), bases=bases, steps=steps)


def takes_shape(model: ModelSpec, shape: Shape) -> bool:
    """Whether heads and columns divide by tp, and each stage has a layer."""
    try:
        check_shape(model, shape)
    except BadConfig:
        return False
    return True


def assumed_loads(host_bytes_per_s: float, *, host_latency_s: float = 1e-4) -> LoadRates:
    """Store over a 10 Gbit/s network, NVMe with checksum and packing; the host link as given."""
    return LoadRates(
        store=Hop(latency_s=0.03, bytes_per_s=1e9),
        disk=Hop(latency_s=0.005, bytes_per_s=2e9),
        host=Hop(latency_s=host_latency_s, bytes_per_s=host_bytes_per_s),
    )


class _Probes:
    """Imagined steps, each with one thing in it, and how to read coefficients off their parts."""

    def __init__(self, model: ModelSpec, knots: Sequence[float]) -> None:
        self.knots = np.array(knots)
        # A product reads its weights for the first token already; beyond the last knot the curve goes on straight.
        self.tokens = np.array([1.0, *knots[1:], 2.0 * knots[-1]])
        self.num_curve = len(self.tokens)
        self.adapter = AdapterWork.of_blocks(
            [
                AdapterBlock(layer=layer, module=module, lora_rank=_REFERENCE_RANK, scale=1.0)
                for layer in range(model.num_layers)
                for module in LORA_MODULES
            ],
            model,
        )
        # After the curve: one sampled row, _ROWS of them, keys, pairs, an adapter's bytes, a token's LoRA.
        self.sampled, self.sampled_many, self.keys, self.pairs, self.read, self.computed = range(
            self.num_curve, self.num_curve + 6
        )
        size = self.num_curve + 6
        self.many = 1e9
        """Keys and pairs of their probes: beside them the tokens of the probe count for nothing."""

        def column(**at: float) -> FloatArray:
            values = np.zeros(size)
            for name, value in at.items():
                values[getattr(self, name)] = value
            return values

        num_tokens = column(sampled=1, sampled_many=_ROWS, keys=1, pairs=2048, read=1, computed=_ROWS)
        num_tokens[: self.num_curve] = self.tokens
        self.work = StepWork(
            num_tokens=num_tokens,
            num_sampled=column(sampled=1, sampled_many=_ROWS),
            kv_read_tokens=column(keys=self.many),
            attended_pairs=column(pairs=self.many),
            adapters=self._of_adapter(column(read=1)),
            lora=self._of_adapter(column(computed=_ROWS)),
        )

    def _of_adapter(self, times: FloatArray) -> AdapterWork:
        one = self.adapter
        return AdapterWork(
            sharded=one.sharded * times,
            replicated=one.replicated * times,
            sharded_outputs=one.sharded_outputs * times,
            replicated_outputs=one.replicated_outputs * times,
        )


def _stage_coefficients(
    cost: RooflineCost, probes: _Probes, num_layers: int, *, itemsize: int, overheads: Overheads
) -> FloatArray:
    """``StepCoefficients.array`` of one stage without the host's part."""

    def seconds(part: Part) -> FloatArray:
        found = cost.parts.get(part)
        return np.zeros(len(probes.work)) if found is None else found.seconds / overheads.efficiency

    curve = seconds(Part.GEMM) + seconds(Part.ELEMENTWISE) + seconds(Part.ATTENTION)
    curve = (curve + cost.parts[Part.COLLECTIVES].seconds)[: probes.num_curve]
    slopes = np.diff(curve) / np.diff([0.0, *probes.tokens[1:]])
    head = seconds(Part.LM_HEAD) + seconds(Part.SAMPLING)
    lora = seconds(Part.ADAPTERS) + seconds(Part.LORA_OUTPUTS)
    coefficients = StepCoefficients(
        fixed_s=float(curve[0] + head[probes.sampled]) + num_layers * overheads.layer_s,
        prefill_s=num_layers * overheads.prefill_layer_s,
        lora_s=num_layers * overheads.lora_layer_s,
        row_s=float(head[probes.sampled_many] - head[probes.sampled]) / (_ROWS - 1),
        pair_s=float(seconds(Part.ATTENTION)[probes.pairs]) / probes.many,
        kv_token_s=float(seconds(Part.ATTENTION)[probes.keys]) / probes.many,
        adapter_byte_s=float(seconds(Part.ADAPTERS)[probes.read] / (probes.adapter.elements[0] * itemsize)),
        lora_token_s=float(lora[probes.computed]) / _ROWS,
        token_knots=tuple(probes.knots.tolist()),
        token_slopes=tuple(np.maximum(slopes, 0.0).tolist()),
    )
    return coefficients.array()


def _token_knots(ceilings: Ceilings, itemsize: int) -> tuple[float, ...]:
    """The rows at which a product turns from reading its weights to multiplying is one of them."""
    crossing = float(ceilings.flops_per_s(np.array([1.0]))[0]) * itemsize / (2.0 * ceilings.copy_bytes_per_s)
    return (0.0, *sorted({round(crossing, 1), *_KNOTS}))
