"""What the engine promises of a request, from its refusal to its end, one promise a test."""

from dataclasses import replace

import pytest
from loraplex.core.errors import (
    BadConfig,
    Conflict,
    ContextTooLong,
    InvalidInput,
    LoraplexError,
    NotFound,
    StorageFull,
    Unavailable,
    error_from_code,
)
from loraplex.core.ids import BaseModelId, RequestId
from loraplex.core.request import EngineRequest, FinishReason
from loraplex.testing.fake_executor import expected_tokens
from loraplex.testing.steps import run_step

from tests.engine.harness import A, B, Harness, make


def test_prompts_are_cut_into_chunks_beside_decoding_rows() -> None:
    harness = Harness(max_step_tokens=10)
    first = harness.add(make("a", prompt=5, max_tokens=12))
    harness.step()
    second = harness.add(make("b", prompt=40, tenant="u"))
    harness.step(6)
    shares = [[len(row.token_ids) for row in plan.rows] for plan in harness.plans]
    assert shares == [[5], [1, 9], [1, 9], [1, 9], [1, 9], [1, 4], [1, 1]]
    harness.run()
    harness.check(first, second)


def test_aborts_free_pages_at_once_or_after_the_step() -> None:
    harness = Harness()
    harness.add(make("a", max_tokens=50))
    harness.step()
    (output,) = harness.engine.abort(RequestId("a"))
    assert output.finish_reason is FinishReason.ABORT
    assert harness.engine.load_report().num_free_pages == 64
    harness.add(make("b", max_tokens=50))
    plan = harness.engine.schedule(5.0).plan
    assert plan is not None
    (output,) = harness.engine.abort(RequestId("b"))
    assert (output.finish_reason, output.tokens) == (FinishReason.ABORT, ())
    assert harness.engine.num_unfinished == 0
    assert harness.engine.abort(RequestId("b")) == ()
    assert harness.engine.load_report().num_free_pages < 64, "the step still writes to its pages"
    harness.engine.validate()
    assert harness.engine.complete(run_step(harness.executor, plan), 6.0) == ()
    assert harness.engine.load_report().num_free_pages == 64


def test_a_resumed_request_goes_on_where_it_was() -> None:
    harness = Harness()
    request = make("a", max_tokens=10)
    expected = expected_tokens(request, 10)
    harness.add(replace(request, resumed_token_ids=expected[:6]))
    harness.run()
    assert tuple(harness.tokens["a"]) == expected[6:]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (make("x", prompt=()), InvalidInput),
        (make("x", prompt=(1, 1000)), InvalidInput),
        (make("x", prompt=(-1,)), InvalidInput),
        (replace(make("x"), base_model_id=BaseModelId("other")), InvalidInput),
        (replace(make("x", max_tokens=2), resumed_token_ids=(1, 2)), InvalidInput),
        (make("x", prompt=256), ContextTooLong),
        (make("x", prompt=100, max_tokens=60), ContextTooLong),
    ],
)
def test_what_can_never_run_is_refused(request_: EngineRequest, error: type[Exception]) -> None:
    harness = Harness(num_pages=32)
    with pytest.raises(error):
        harness.add(request_)
    assert harness.engine.num_unfinished == 0


def test_an_id_in_use_is_refused() -> None:
    harness = Harness()
    harness.add(make("x"))
    with pytest.raises(Conflict):
        harness.add(make("x"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("deleted", code="artifact_not_found"), NotFound.code),
        (Unavailable("away"), Unavailable.code),
        (StorageFull("full"), StorageFull.code),
        (LoraplexError("broken", code="generation_failed"), "generation_failed"),
    ],
)
def test_a_failure_keeps_its_kind(error: LoraplexError, code: str) -> None:
    harness = Harness()
    harness.add(make("waits", adapter=A))
    (output,) = harness.engine.adapter_failed(A, error)
    assert (output.error, output.error_code) == (error.message, code)
    harness.add(make("loads", adapter=B))
    harness.stage(B)
    harness.engine.schedule(1.0)
    (output,) = harness.engine.loads_failed({B: error})
    assert (output.error, output.error_code) == (error.message, code)
    harness.add(make("runs"))
    harness.engine.schedule(2.0)
    (output,) = harness.engine.step_failed(error)
    assert (output.error, output.error_code) == (error.message, code)
    assert error_from_code(code, error.message).class_code == code


def test_a_step_must_hold_one_token_of_each_running_request() -> None:
    with pytest.raises(BadConfig):
        Harness(max_running=100, max_step_tokens=64)


def test_generation_ends_at_the_context() -> None:
    harness = Harness(num_pages=64)
    harness.add(make("x", prompt=250, max_tokens=6))
    harness.add(make("y", prompt=250, max_tokens=100, tenant="u"))
    harness.run()
    assert len(harness.tokens["y"]) == 6
    assert harness.outputs["y"][-1].finish_reason is FinishReason.LENGTH
