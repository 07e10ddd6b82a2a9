"""The fake executor notices an engine that breaks the contract of steps in flight."""

import pytest
from loraplex.core.ids import Digest
from loraplex.core.request import SamplingParams
from loraplex.core.step import Row, RowStart, StepPlan
from loraplex.testing.fake_executor import FakeExecutor, fake_manifest

RUNNING, NEW = Digest("a" * 64), Digest("b" * 64)


@pytest.fixture
def executor() -> FakeExecutor:
    """A step is in flight whose KV lies in pages 0 and 1 and whose adapter lies in page 2."""
    executor = FakeExecutor(page_size=4, max_in_flight=2)
    for digest in (RUNNING, NEW):
        executor.stage_adapter(fake_manifest(digest), "unused")
    executor.load_adapter(RUNNING, (2,))
    start = RowStart(
        slot=0, sampling=SamplingParams(max_tokens=4, seed=0), token_ids=tuple(range(5)), num_prompt_tokens=5
    )
    row = Row(slot=0, token_ids=tuple(range(5)), start=0, pages=(0, 1), adapter=RUNNING, samples=True)
    executor.submit(StepPlan(step_id=1, releases=(), starts=(start,), rows=(row,)))
    return executor


@pytest.mark.parametrize("page", [0, 1, 2])
def test_an_adapter_over_pages_of_a_step_in_flight_is_a_violation(executor: FakeExecutor, page: int) -> None:
    with pytest.raises(AssertionError, match="over pages of a step in flight"):
        executor.load_adapter(NEW, (page,))
    assert len(executor.violations) == 1
    executor.collect()
    executor.load_adapter(NEW, (page,))


def test_dropping_an_adapter_that_a_step_in_flight_names_is_a_violation(executor: FakeExecutor) -> None:
    with pytest.raises(AssertionError, match="dropped"):
        executor.drop_adapter(RUNNING)
    assert len(executor.violations) == 1
    executor.collect()
    executor.drop_adapter(RUNNING)


def test_other_pages_may_be_loaded_while_a_step_is_in_flight(executor: FakeExecutor) -> None:
    executor.load_adapter(NEW, (3,))
    assert executor.violations == []
    executor.collect()
