"""Analytic profiles: what they must agree with, and what shapes and links must do to them."""

import numpy as np
import pytest
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.analytic import ALL_SHAPES, Overheads, analytic_profile, analytic_step_cost, takes_shape
from loraplex.cost.ceilings import ceilings_of
from loraplex.cost.profile import CostProfile, shipped_profiles
from loraplex.cost.roofline import roofline
from loraplex.cost.step_cost import StepComposition
from loraplex.cost.work import step_work

H100 = ceilings_of("h100-80gb")
NOTHING = Overheads(efficiency=1.0, step_s=0.0, layer_s=0.0, prefill_layer_s=0.0, lora_layer_s=0.0)


def _decode(rows: float, *, adapters: int = 0) -> StepComposition:
    """Rows of 320 tokens of context; rank-16 adapters of an 8B model."""
    return StepComposition.of(
        decode_rows=rows,
        kv_tokens=320 * rows,
        num_adapters=adapters,
        adapter_bytes=adapters * 83_886_080,
        lora_tokens=rows if adapters else 0,
    )


def _prefill(prompts: int, tokens: int) -> StepComposition:
    return StepComposition.of(
        prefill_rows=prompts,
        prefill_tokens=prompts * tokens,
        prefill_pairs=prompts * tokens * (tokens + 1) / 2,
        kv_tokens=prompts * tokens,
    )


def test_without_overheads_it_is_the_roofline(llama_8b: ModelSpec) -> None:
    """Random steps of base requests, up to the interpolation between knots, and with KV's bytes and FLOPs added up."""
    random = np.random.default_rng(0)
    num_steps = 200
    step, start, tokens = [], [], []
    for index in range(num_steps):
        rows = int(random.integers(1, 257))
        chunks = int(random.integers(0, 4))
        step += [index] * (rows + chunks)
        start += random.integers(1, 3000, size=rows + chunks).tolist()
        tokens += [1] * rows + random.integers(64, 1024, size=chunks).tolist()
    columns = {"step": np.array(step), "start": np.array(start), "num_tokens": np.array(tokens)}
    base = np.full(len(step), -1)
    work = step_work(
        llama_8b, **columns, samples=np.ones(len(step), dtype=bool), adapter=base, sizes=[], num_steps=num_steps
    )
    ideal_s = roofline(llama_8b, work, H100).unfused_s
    steps = StepComposition.of_rows(llama_8b, **columns, adapter=base, adapter_bytes=np.zeros(0), num_steps=num_steps)
    cost = analytic_step_cost(llama_8b, H100, Shape(), overheads=NOTHING)
    errors = np.abs(cost.interval_s(steps) / ideal_s - 1.0)
    assert float(errors.max()) < 0.09
    assert float(np.median(errors)) < 0.035


def test_an_adapter_costs_its_bytes(llama_8b: ModelSpec) -> None:
    cost = analytic_step_cost(llama_8b, H100, Shape(), overheads=NOTHING)
    one, many = (cost.interval_s(_decode(32, adapters=count))[0] for count in (1, 32))
    assert many - one == pytest.approx(31 * 83_886_080 / H100.copy_bytes_per_s)
    plain = cost.interval_s(_decode(32))[0]
    assert plain < one < 1.05 * plain


def test_decode_of_one_row_on_an_h100_is_near_what_is_aimed_at(llama_8b: ModelSpec) -> None:
    (seconds,) = analytic_step_cost(llama_8b, H100, Shape()).latency_s(_decode(1))
    assert 5.0e-3 < seconds < 6.4e-3


@pytest.mark.parametrize("shape", [Shape(tp=2), Shape(tp=4), Shape(tp=8)])
def test_tensor_parallelism_over_nvlink_pays(llama_8b: ModelSpec, shape: Shape) -> None:
    one, group = (analytic_step_cost(llama_8b, H100, s) for s in (Shape(), shape))
    for steps in (_decode(1), _decode(64), _prefill(8, 256)):
        gain = float((one.latency_s(steps) / group.latency_s(steps))[0])
        assert 1.3 < gain < shape.tp
    assert group.interval == group.latency


@pytest.mark.parametrize("pp", [2, 4])
def test_pipelines_raise_the_pace_and_not_the_speed(llama_8b: ModelSpec, pp: int) -> None:
    one, group = (analytic_step_cost(llama_8b, H100, s) for s in (Shape(), Shape(pp=pp)))
    for steps in (_decode(32), _prefill(8, 256)):
        alone, pace, latency = one.latency_s(steps)[0], group.interval_s(steps)[0], group.latency_s(steps)[0]
        # The head makes the last stage slower than the others; hand-overs add to the latency.
        assert alone / pp < pace < 1.35 * alone / pp
        assert alone < latency < 1.02 * alone


def test_tensor_parallelism_over_a_slow_bus_hurts(llama_8b: ModelSpec) -> None:
    """Two GPUs are slower than one, for one row and for many; pipelines are not."""
    pcie = ceilings_of("h100-pcie")
    one, tp, pp = (analytic_step_cost(llama_8b, pcie, s) for s in (Shape(), Shape(tp=2), Shape(pp=2)))
    for steps in (_decode(1), _decode(64), _prefill(8, 256)):
        assert tp.latency_s(steps)[0] > 1.1 * one.latency_s(steps)[0]
        assert pp.interval_s(steps)[0] < 0.65 * one.interval_s(steps)[0]


def test_shipped_profiles_are_what_arithmetic_gives() -> None:
    """After a change of ceilings or roofline: ``loraplex profile --analytic`` writes them anew."""
    assert {"h100-80gb", "h100-pcie"} <= set(shipped_profiles())
    for name in shipped_profiles():
        shipped = CostProfile.load(name)
        assert {step.source for step in shipped.steps} == {"analytic"}
        assert {base.name for base in shipped.bases} == {"llama3-8b", "llama3-70b"}
        again = analytic_profile([base.model for base in shipped.bases], ceilings_of(name))
        assert again.to_json() == shipped.to_json()


def test_shapes_that_do_not_divide_are_left_out(llama_8b: ModelSpec) -> None:
    assert all(takes_shape(llama_8b, shape) for shape in ALL_SHAPES)
    assert not takes_shape(llama_8b, Shape(tp=3))
    profile = analytic_profile([llama_8b], H100, [Shape(), Shape(tp=3), Shape(pp=64)])
    assert profile.shapes("llama3-8b", "h100-80gb") == (Shape(),)
