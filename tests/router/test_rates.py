"""Rates: the line through a cost model, and what is measured where no profile knows a replica."""

import random

import pytest
from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import Shape
from loraplex.core.wire import LoadReport, ReplicaInfo
from loraplex.cost.profile import CostProfile
from loraplex.cost.step_cost import StepComposition
from loraplex.router.config import RouterConfig
from loraplex.router.prediction import OutputLength, Rates, decode_step_s, first_token_s
from loraplex.router.rates import MeasuredRates, RateBook

KNOWN = ("h100-80gb",)


def route(*, base: str = "llama3-8b", gpu: str = "h100-80gb", shape: Shape | None = None) -> ReplicaRoute:
    return ReplicaRoute(
        replica_id=ReplicaId("r"), base_model_id=BaseModelId(base), address="a:1", gpu=gpu, shape=shape or Shape()
    )


@pytest.mark.parametrize("shape", [Shape(), Shape(tp=2), Shape(pp=2)])
def test_the_line_is_near_the_cost_model(shape: Shape) -> None:
    cost = CostProfile.load("h100-80gb").step_cost("llama3-8b", "h100-80gb", shape)
    rates = Rates.of(cost, shape, max_step_tokens=2048, max_running=256)
    for rows in (1, 32, 128):
        contexts = 500.0 * rows
        steps = StepComposition.of(
            decode_rows=rows / shape.pp, kv_tokens=contexts / shape.pp, num_adapters=0, lora_tokens=rows / shape.pp
        )
        expected_s = shape.pp * float(cost.interval_s(steps)[0])
        found_s = decode_step_s(rates.step_s, rates.row_s, rates.context_token_s, rows, contexts)
        assert found_s == pytest.approx(expected_s, rel=0.05)
    for tokens in (600, 1500, 2000):
        pairs = tokens * 513 / 2
        steps = StepComposition.of(
            prefill_rows=tokens / 512 / shape.pp,
            prefill_tokens=tokens / shape.pp,
            prefill_pairs=pairs / shape.pp,
            lora_tokens=tokens / shape.pp,
        )
        expected_s = shape.pp * float(cost.interval_s(steps)[0])
        found_s = first_token_s(
            rates.step_s, rates.prefill_s, rates.token_s, rates.free_tokens, 2048, 256, 0, 0, 0, 1e9, tokens, 128
        )
        assert found_s == pytest.approx(expected_s, rel=0.16)


def test_a_replica_without_a_profile_is_measured() -> None:
    draw, measured = random.Random(0), MeasuredRates()
    before = LoadReport()
    for _ in range(400):
        steps = draw.randint(1, 5)
        rows, tokens = steps * draw.randint(0, 60), draw.choice([0, 0, 300, 2000])
        busy_s = (0.01 * steps + 1e-4 * rows + 4e-5 * tokens) * draw.uniform(0.97, 1.03)
        after = LoadReport(
            steps=before.steps + steps,
            generated_tokens=before.generated_tokens + rows,
            prefilled_tokens=before.prefilled_tokens + tokens,
            busy_s=before.busy_s + busy_s,
        )
        measured.observe(before, after)
        before = after
    assert measured.rates.step_s == pytest.approx(0.01, rel=0.05)
    assert measured.rates.row_s == pytest.approx(1e-4, rel=0.1)
    assert measured.rates.token_s == pytest.approx(4e-5, rel=0.05)
    # A replica that starts anew tells less than before, or nothing at all.
    assert not measured.observe(before, LoadReport())
    assert not measured.observe(LoadReport(), LoadReport(steps=5))


def test_what_never_varies_is_not_guessed_below_nothing() -> None:
    measured = MeasuredRates()
    for step in range(64):
        measured.observe(
            LoadReport(steps=step, generated_tokens=8 * step, busy_s=0.02 * step),
            LoadReport(steps=step + 1, generated_tokens=8 * step + 8, busy_s=0.02 * step + 0.02),
        )
    rates = measured.rates
    assert min(rates.step_s, rates.row_s, rates.token_s) >= 0
    assert rates.step_s + 8 * rates.row_s == pytest.approx(0.02, rel=0.01)


def test_profiles_are_used_where_they_know_a_replica_and_alike_replicas_share_what_is_measured() -> None:
    book = RateBook(RouterConfig(profiles=KNOWN, adapter_load_s=1.0, adapter_fetch_s=2.0))
    info = ReplicaInfo(
        replica_id=ReplicaId("r"),
        base_model_id=BaseModelId("llama3-8b"),
        max_context_tokens=1,
        num_pages=1,
        page_size=16,
        max_running=7,
        max_step_tokens=512,
    )
    rates = book.rates(route(), info)
    assert (rates.max_running, rates.max_step_tokens) == (7, 512)
    assert 0.005 < rates.step_s < 0.008
    load_s, fetch_s = book.load_s(route())
    assert 0.001 < load_s < 0.01 < fetch_s < 0.1
    unknown = route(base="mine", gpu="")
    assert book.load_s(unknown) == (1.0, 2.0)
    assert book.observe(unknown, LoadReport(), LoadReport(steps=10, busy_s=0.5))
    assert book.rates(unknown, None).step_s == pytest.approx(0.05, rel=1e-3)
    assert book.rates(route(base="mine", gpu="", shape=Shape(tp=2)), None).step_s != pytest.approx(0.05, rel=0.1)
    with pytest.raises(BadConfig, match="nowhere"):
        RateBook(RouterConfig(profiles=("nowhere",)))


def test_the_expected_length_follows_those_that_end() -> None:
    length = OutputLength(256.0)
    for _ in range(300):
        length.ended(40)
    assert length.expected == pytest.approx(40, abs=2)
