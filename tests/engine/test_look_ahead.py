"""What holds when a step is planned while the one before it is in flight."""

from typing import Any

import pytest
from loraplex.core.clock import SystemClock
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import Digest, RequestId
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput
from loraplex.core.step import PENDING, StepPlan
from loraplex.engine import Engine, EngineConfig
from loraplex.replica.driver import StepDriver
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens, fake_manifest, fake_model

from tests.engine.harness import A
from tests.engine.harness import make as request_of


class World:
    """Engine and executor; ``plan`` and ``collect`` are called by the test."""

    def __init__(self, *, num_pages: int = 64, max_in_flight: int = 2, **config: float) -> None:
        self.executor = FakeExecutor(
            model=fake_model(max_context_tokens=256), num_pages=num_pages, max_in_flight=max_in_flight
        )
        settings = {"max_running": 8, "max_step_tokens": 64, **config}
        self.engine = Engine(
            EngineConfig(**settings),  # type: ignore[arg-type]
            model=self.executor.model,
            arena=self.executor.arena,
        )
        self.driver = StepDriver(self.engine, self.executor, clock=SystemClock(), unstage=self.executor.unstage_adapter)
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(self, request: EngineRequest) -> EngineRequest:
        self.engine.add(request, 0.0)
        return request

    def plan(self) -> StepPlan | None:
        instructions = self.engine.schedule(0.0)
        for load in instructions.loads:
            self.executor.load_adapter(load.digest, load.pages)
        if instructions.plan is not None:
            self.executor.submit(instructions.plan)
        self.engine.validate()
        return instructions.plan

    def collect(self) -> None:
        self.take(self.engine.complete(self.executor.collect(), 0.0))
        self.engine.validate()

    def take(self, outputs: tuple[RequestOutput, ...]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def tokens(self, name: str) -> tuple[int, ...]:
        return tuple(token.token_id for output in self.outputs.get(name, []) for token in output.tokens)

    def run(self) -> None:
        while self.engine.num_unfinished or self.engine.num_in_flight:
            outcome = self.driver.step()
            assert outcome.progressed, "the engine stalled"
            self.take(outcome.outputs)
            self.engine.validate()
        assert not self.executor.violations
        assert self.engine.load_report().num_free_pages == self.executor.arena.num_pages


def make(name: str, *, max_tokens: int = 6, **more: Any) -> EngineRequest:
    """Shares no pages with others."""
    return request_of(name, max_tokens=max_tokens, salt=name, **more)


def shares(plan: StepPlan | None) -> list[tuple[int, ...]]:
    assert plan is not None
    return [row.token_ids for row in plan.rows]


def test_a_pending_token_stands_in_the_next_step_and_nothing_follows_the_last() -> None:
    world = World()
    request = world.add(make("r", max_tokens=3))
    first = world.plan()
    assert shares(first) == [tuple(range(8))]
    assert shares(world.plan()) == [(PENDING,)]
    world.collect()
    second = expected_tokens(request, 3)[1]
    third = world.plan()
    assert third is not None, "of three tokens two are known or pending: one more follows"
    assert [row.token_ids for row in third.rows] == [(PENDING,)]
    world.collect()
    assert world.tokens("r")[1] == second
    assert world.plan() is None, "the pending token is the last that it may have"
    world.collect()
    assert world.tokens("r") == expected_tokens(request, 3)
    world.run()


def test_the_chunks_of_a_prompt_follow_each_other_in_flight() -> None:
    world = World(max_step_tokens=8)
    request = world.add(make("r", prompt=20, max_tokens=2))
    assert shares(world.plan()) == [tuple(range(8))]
    assert shares(world.plan()) == [tuple(range(8, 16))]
    world.collect()
    assert shares(world.plan()) == [tuple(range(16, 20))]
    world.run()
    assert world.tokens("r") == expected_tokens(request, 2)


def test_a_stop_token_ends_a_request_at_once_and_the_late_token_is_dropped() -> None:
    world = World()
    world.executor.stage_adapter(fake_manifest(A), "")
    world.engine.adapter_staged(A, 1, 0.0)
    third = expected_tokens(make("r", adapter=A), 3)[2]
    world.add(make("r", max_tokens=20, stop=(third,), adapter=A))
    first = world.plan()
    assert first is not None
    for _ in range(3):
        assert world.plan() is not None
        world.collect()
    assert [output.finish_reason for output in world.outputs["r"]] == [None, None, FinishReason.STOP]
    assert world.engine.num_unfinished == 0
    assert world.engine.num_in_flight == 1
    # Its id is free, its slot and pages are not.
    again = world.add(make("r", max_tokens=4, adapter=A))
    plan = world.plan()
    assert plan is not None
    assert plan.rows[0].slot != first.rows[0].slot
    world.collect()
    assert len(world.outputs["r"]) == 3, "the late token was given out"
    world.outputs.clear()
    world.run()
    assert world.tokens("r") == expected_tokens(again, 4)


def test_an_abort_is_answered_at_once_and_what_it_holds_stays_until_the_step_is_done() -> None:
    world = World(max_in_flight=3)
    world.add(make("r", max_tokens=50))
    other = world.add(make("other", max_tokens=6, tenant="u"))
    world.plan()
    world.plan()
    (output,) = world.engine.abort(RequestId("r"))
    assert output.finish_reason is FinishReason.ABORT
    free = world.engine.load_report().num_free_pages
    third = world.plan()
    assert third is not None
    assert len(third.rows) == 1, "no more rows for an aborted request"
    assert third.releases == ()
    world.collect()
    assert world.engine.load_report().num_free_pages == free
    world.collect()
    assert world.engine.load_report().num_free_pages > free
    world.run()
    assert world.tokens("other") == expected_tokens(other, 6)


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    world = World(num_pages=9, prefix_cache=False)
    old = world.add(make("old", prompt=12, max_tokens=20))
    young = world.add(make("young", prompt=12, max_tokens=20, tenant="u", arrival_s=1.0))
    waited = 0
    while world.engine.num_unfinished:
        while world.engine.num_in_flight < 2:
            before = world.engine.num_preemptions
            in_flight = world.engine.num_in_flight
            if world.plan() is None:
                waited += in_flight
                break
            assert in_flight == 0 or world.engine.num_preemptions == before
        world.collect()
    assert world.engine.num_preemptions > 0
    assert waited > 0
    for request in (old, young):
        assert world.tokens(request.request_id) == expected_tokens(request, 20)


def test_online_still_takes_the_place_of_offline() -> None:
    world = World(max_running=1)
    world.add(make("off", max_tokens=100, offline=True))
    world.plan()
    world.plan()
    world.add(make("on", max_tokens=2, tenant="u"))
    world.collect()
    assert world.plan() is None, "a preemption is due, which no step in flight allows"
    world.collect()
    plan = world.plan()
    assert plan is not None
    assert plan.releases
    world.run()
    assert world.tokens("on") == expected_tokens(make("on"), 2)
    assert len(world.tokens("off")) == 100


def test_what_a_step_in_flight_admits_counts_for_its_tenant() -> None:
    world = World(max_step_tokens=16, overdue_s=1e9, prefix_cache=False)
    for tenant, prompt in (("x", 16), ("y", 17)):
        for index in range(2):
            world.add(make(f"{tenant}{index}", prompt=prompt, tenant=tenant))
    admitted = [start.num_prompt_tokens for plan in (world.plan(), world.plan()) if plan for start in plan.starts]
    assert admitted == [16, 17], "one tenant was admitted twice"
    world.run()


@pytest.mark.parametrize("call", ["submit", "collect"])
def test_a_passing_failure_with_two_steps_in_flight_costs_no_token(call: str) -> None:
    world = World(max_step_tokens=16)
    requests = [world.add(make(f"r{index}", prompt=12, max_tokens=12, tenant=f"{index}")) for index in range(4)]
    for _ in range(3):
        world.take(world.driver.step().outputs)
    assert world.engine.num_in_flight == 1
    world.executor.fails_once_in = call  # type: ignore[assignment]
    world.run()
    for request in requests:
        assert world.tokens(request.request_id) == expected_tokens(request, 12)


def test_a_step_that_cannot_be_started_beside_another_is_blamed_on_nobody() -> None:
    world = World()
    request = world.add(make("r", max_tokens=12))
    assert world.plan() is not None
    assert world.engine.schedule(0.0).plan is not None
    assert world.engine.submit_failed(LoraplexError("no memory")) == ()
    assert world.plan() is None, "the steps in flight come first"
    world.collect()
    plan = world.plan()
    assert plan is not None
    assert plan.starts
    assert plan.releases == (plan.starts[0].slot,)
    world.run()
    assert world.tokens("r") == expected_tokens(request, 12)


def test_a_slot_is_released_once_when_two_steps_fail_one_after_the_other() -> None:
    world = World()
    requests = [world.add(make(f"r{index}", max_tokens=12, tenant=f"{index}")) for index in range(2)]
    assert world.plan() is not None
    assert world.engine.schedule(0.0).plan is not None
    world.engine.submit_failed(LoraplexError("no memory"))
    world.executor.fails_once_in = "collect"
    world.take(world.driver.step().outputs)
    plan = world.plan()
    assert plan is not None
    assert len(set(plan.releases)) == len(plan.releases) == 2
    world.run()
    for request in requests:
        assert world.tokens(request.request_id) == expected_tokens(request, 12)


def test_the_culprit_of_the_oldest_step_ends_alone() -> None:
    world = World()
    world.executor.poisoned = frozenset({A})
    world.executor.stage_adapter(fake_manifest(A), "")
    world.engine.adapter_staged(A, 1, 0.0)
    good = [world.add(make(f"r{index}", max_tokens=9, tenant=f"{index}")) for index in range(3)]
    world.take(world.driver.step().outputs)
    world.add(make("bad", adapter=A))
    world.run()
    assert [output.finish_reason for output in world.outputs["bad"]] == [FinishReason.ERROR]
    for request in good:
        assert world.tokens(request.request_id) == expected_tokens(request, 9)


def test_an_adapter_is_loaded_over_pages_that_no_step_in_flight_uses() -> None:
    """The executor refuses a load over pages in flight; here every load takes the pages of what has just ended."""
    world = World(num_pages=9, prefix_cache=False, max_running=3)
    digests = [Digest(letter * 64) for letter in "abcdef"]
    for digest in digests:
        world.executor.stage_adapter(fake_manifest(digest, lora_rank=16), "")
        world.engine.adapter_staged(digest, 2, 0.0)
    requests = [
        world.add(make(f"r{index}", prompt=5, max_tokens=3 + index % 4, adapter=digests[index % 6], tenant=f"{index}"))
        for index in range(24)
    ]
    world.run()
    for request in requests:
        assert world.tokens(request.request_id) == expected_tokens(request, request.sampling.max_tokens)
