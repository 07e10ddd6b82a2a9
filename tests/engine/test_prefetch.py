"""Adapters of waiting requests are loaded before their turn, at nobody's cost; cold ones run in bounded time."""

import pytest
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason
from loraplex.testing.fake_executor import PAGE_BYTES

from tests.engine.harness import A, B, Harness, make

C = Digest("c" * 64)


class World(Harness):
    """One request runs at a time; ``run`` checks what all of them got."""

    def __init__(self, *, num_pages: int = 64, **config: float) -> None:
        super().__init__(num_pages=num_pages, **{"max_running": 1, "prefix_cache": False, **config})
        self.requests: list[EngineRequest] = []

    def stage_pages(self, digest: Digest, *, pages: int = 2) -> None:
        self.stage(digest, lora_rank=8 * pages)

    def ask(
        self, name: str, adapter: Digest | None = None, *, prompt: int = 4, max_tokens: int = 4, tenant: str = "t"
    ) -> None:
        request = make(name, prompt=prompt, max_tokens=max_tokens, tenant=tenant, adapter=adapter, arrival_s=self.now_s)
        self.requests.append(self.add(request))

    def run(self, limit: int = 500) -> None:
        super().run(limit)
        self.check(*self.requests)
        assert not self.executor.violations

    @property
    def counts(self) -> tuple[int, int, int]:
        """(loads, prefetches, hits)"""
        report = self.engine.load_report()
        return report.adapter_loads, report.adapter_prefetches, report.adapter_hits


def test_who_waits_finds_its_adapter_resident() -> None:
    world = World()
    for digest in (A, B, C):
        world.stage_pages(digest)
        world.ask(digest[0], digest)
    world.step()
    assert world.loads == [(A, B, C)], "what the plan needs first, then in the order of the queue"
    assert world.counts == (1, 2, 0)
    world.run()
    assert sum(world.loads, ()) == (A, B, C)
    assert world.counts == (1, 2, 2)


def test_a_load_starts_when_its_request_arrives_beside_a_step_in_flight_even_without_a_plan() -> None:
    world = World()
    world.stage_pages(A)
    world.ask("base", max_tokens=1)
    plan = world.schedule().plan
    assert plan is not None
    world.executor.submit(plan)
    world.ask("a", A)
    assert world.schedule().plan is None
    assert world.loads == [(), (A,)]
    world.take(world.engine.complete(world.executor.collect(), world.now_s))
    world.run()
    assert world.counts == (0, 1, 1)


@pytest.mark.parametrize(("num_pages", "loaded"), [(14, False), (15, True)])
def test_what_a_nearer_request_needs_is_not_taken(num_pages: int, loaded: bool) -> None:
    """Two pages run, one is kept in reserve, ten are for the nearer request: an adapter of two must find them free."""
    world = World(num_pages=num_pages)
    world.stage_pages(A)
    world.ask("runs")
    world.step()
    world.ask("nearer", prompt=40, max_tokens=1)
    world.now_s += 1
    world.ask("later", A, max_tokens=1, tenant="other")
    world.engine._scheduler.counters.charge(TenantName("other"), 1e6)
    world.step()
    assert world.loads[1] == ((A,) if loaded else ())
    world.run()


def test_adapters_that_nobody_waits_for_give_way_and_those_of_nearer_requests_do_not() -> None:
    world = World(num_pages=16, max_adapter_bytes=4 * PAGE_BYTES)
    for digest in (A, B):
        world.stage_pages(digest)
        world.ask(digest[0], digest, max_tokens=1)
        world.run()
    assert world.engine.resident_adapters() == (A, B)
    world.stage_pages(C)
    world.ask("base", max_tokens=20)
    world.step()
    world.ask("a again", A)
    world.now_s += 1
    world.ask("c", C)
    world.step()
    assert world.drops == [B], "A is older, and waited for"
    assert world.loads[-1] == (C,)
    world.run()
    assert world.counts == (2, 1, 2)


def test_cached_prefixes_of_nearer_requests_outlive_a_load_ahead() -> None:
    world = World(num_pages=16, prefix_cache=True)
    world.ask("old", prompt=17, max_tokens=1)
    world.run()
    world.ask("younger", prompt=20, max_tokens=1, tenant="y")
    world.run()
    world.stage_pages(A, pages=5)
    world.ask("base", prompt=5, max_tokens=20, tenant="z")
    world.step()
    world.ask("old again", prompt=17, max_tokens=1)
    world.now_s += 1
    world.ask("a", A, tenant="late")
    world.engine._scheduler.counters.charge(TenantName("late"), 1e6)
    world.step()
    assert world.loads[-1] == (A,)
    world.run()
    assert world.outputs["old again"][-1].num_cached_tokens == 16


def test_so_many_pages_ahead_and_no_more() -> None:
    world = World(max_ahead_bytes=4 * PAGE_BYTES)
    digests = [Digest(f"{i:064d}") for i in range(5)]
    world.ask("base", max_tokens=6)
    for digest in digests:
        world.stage_pages(digest)
        world.ask(digest, digest, max_tokens=2)
    world.step(3)
    assert world.loads == [tuple(digests[:2]), (), ()]
    world.run()
    assert world.counts == (0, 5, 5), "as one is used the next one comes"
    off = World(max_ahead_bytes=0)
    off.stage_pages(A)
    off.ask("base")
    off.ask("a", A)
    off.step()
    assert off.loads == [()]


def test_an_adapter_larger_than_the_bound_is_loaded_ahead_alone() -> None:
    world = World(max_ahead_bytes=PAGE_BYTES)
    for digest in (A, B):
        world.stage_pages(digest, pages=3)
    world.ask("base")
    world.ask("a", A)
    world.now_s += 1
    world.ask("b", B)
    world.step()
    assert world.loads == [(A,)]
    world.run()


def test_pages_that_are_lost_again_are_not_loaded_ahead_twice() -> None:
    """The running one grows over them: whoever waits loads its adapter at its admission."""
    world = World(num_pages=8)
    world.stage_pages(A, pages=4)
    world.ask("grows", prompt=8, max_tokens=24)
    world.ask("a", A)
    world.run()
    assert world.counts == (1, 1, 0)
    assert sum(world.loads, ()) == (A, A)


def test_an_aborted_request_leaves_its_adapter_resident_and_out_of_the_count() -> None:
    world = World(max_ahead_bytes=2 * PAGE_BYTES)
    for digest in (A, B):
        world.stage_pages(digest)
    world.ask("base", max_tokens=9)
    world.ask("a", A)
    world.step()
    world.take(world.engine.abort(RequestId("a")))
    world.requests = [request for request in world.requests if request.request_id != "a"]
    world.ask("b", B)
    world.step()
    assert world.loads == [(A,), (B,)]
    assert set(world.engine.resident_adapters()) == {A, B}
    world.run()


def test_a_load_ahead_that_fails_ends_those_who_wait_for_it_and_nobody_else() -> None:
    world = World()
    world.stage_pages(A)
    world.ask("base", max_tokens=1)
    plan = world.schedule().plan
    assert plan is not None
    world.executor.submit(plan)
    world.ask("a", A)
    assert world.engine.schedule(world.now_s).plan is None
    world.take(world.engine.loads_failed({A: LoraplexError("the copy failed")}))
    world.engine.validate()
    assert world.outputs["a"][-1].finish_reason is FinishReason.ERROR
    world.take(world.engine.complete(world.executor.collect(), world.now_s))
    assert world.outputs["base"][-1].finish_reason is FinishReason.LENGTH
    world.executor.unstage_adapter(A)
    world.ask("again", A)
    assert world.engine.wanted_adapters() == (A,)


@pytest.mark.parametrize("max_ahead_bytes", [0, 512 * PAGE_BYTES])
@pytest.mark.parametrize("num_pages", [12, 64])
def test_a_cold_adapter_runs_in_bounded_time_under_a_flood(num_pages: int, max_ahead_bytes: int) -> None:
    """Hot requests never end and take every page that they can; the cold one's turn comes when it is overdue, and then
    nobody passes it: it runs as soon as those that run have ended."""
    overdue, hot_tokens, max_running = 8, 6, 3
    world = World(
        num_pages=num_pages,
        max_running=max_running,
        overdue_s=float(overdue),
        adapter_token_price=1e6,
        max_ahead_bytes=max_ahead_bytes,
    )
    for digest in (A, B, C):
        world.stage_pages(digest, pages=3)
    count = 0

    def flood() -> None:
        nonlocal count
        while world.engine.num_unfinished < 12:
            world.ask(f"hot{count}", (A, B)[count % 2], max_tokens=hot_tokens, tenant=f"t{count % 3}")
            count += 1

    flood()
    world.step(3)
    world.ask("cold", C, max_tokens=2, tenant="cold")
    steps = 0
    while "cold" not in world.tokens:
        flood()
        world.step()
        steps += 1
        assert steps <= overdue + hot_tokens + 2, "the cold adapter starves"
    assert world.executor.violations == []
