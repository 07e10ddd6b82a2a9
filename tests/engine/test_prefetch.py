"""Adapters of waiting requests are loaded before their turn, at nobody's cost; cold ones run in bounded time."""

import pytest
from loraplex.core.adapter import AdapterRef
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from loraplex.engine import Engine, EngineConfig
from loraplex.engine.instructions import Instructions
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens, fake_manifest, fake_model
from loraplex.testing.steps import run_step

A, B, C = (Digest(letter * 64) for letter in "abc")


class World:
    """One step takes a second; ``loads`` are the adapters of each step's instructions."""

    def __init__(self, *, num_pages: int = 64, **config: float) -> None:
        self.executor = FakeExecutor(model=fake_model(max_context_tokens=256), num_pages=num_pages, page_size=4)
        settings = {"max_running": 1, "max_step_tokens": 64, "prefix_cache": False, **config}
        self.engine = Engine(
            EngineConfig(**settings),  # type: ignore[arg-type]
            model=self.executor.model,
            arena=self.executor.arena,
        )
        self.now_s = 0.0
        self.loads: list[tuple[Digest, ...]] = []
        self.drops: list[Digest] = []
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, RequestOutput] = {}
        self.requests: list[EngineRequest] = []

    def stage(self, digest: Digest, *, pages: int = 2) -> None:
        manifest = fake_manifest(digest, lora_rank=8 * pages)
        self.executor.stage_adapter(manifest, "")
        self.take(self.engine.adapter_staged(digest, pages, self.now_s))

    def add(
        self, name: str, adapter: Digest | None = None, *, prompt: int = 4, max_tokens: int = 4, tenant: str = "t"
    ) -> None:
        ref = None
        if adapter is not None:
            ref = AdapterRef(tenant=TenantName(tenant), name="n", version=1, digest=adapter)
        request = EngineRequest(
            request_id=RequestId(name),
            tenant=TenantName(tenant),
            base_model_id=BaseModelId("fake-base"),
            adapter=ref,
            prompt_token_ids=tuple(range(prompt)),
            sampling=SamplingParams(max_tokens=max_tokens, seed=0),
            arrival_s=self.now_s,
            cache_salt=tenant,
        )
        self.requests.append(request)
        self.engine.add(request, self.now_s)

    def schedule(self) -> Instructions:
        instructions = self.engine.schedule(self.now_s)
        for digest in instructions.drops:
            self.executor.drop_adapter(digest)
        for digest in instructions.unstages:
            self.executor.unstage_adapter(digest)
        for load in instructions.loads:
            self.executor.load_adapter(load.digest, load.pages)
        self.loads.append(tuple(load.digest for load in instructions.loads))
        self.drops.extend(instructions.drops)
        self.engine.validate()
        return instructions

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.now_s += 1.0
            plan = self.schedule().plan
            if plan is not None:
                self.take(self.engine.complete(run_step(self.executor, plan), self.now_s))
                self.engine.validate()

    def run(self) -> None:
        for _ in range(500):
            if not self.engine.num_unfinished:
                break
            self.step()
        for request in self.requests:
            tokens = expected_tokens(request, request.sampling.max_tokens)
            assert tuple(self.tokens[request.request_id]) == tokens
        assert not self.executor.violations

    def take(self, outputs: tuple[RequestOutput, ...]) -> None:
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
            if output.finish_reason is not None:
                self.ended[output.request_id] = output

    @property
    def counts(self) -> tuple[int, int, int]:
        """(loads, prefetches, hits)"""
        report = self.engine.load_report()
        return report.adapter_loads, report.adapter_prefetches, report.adapter_hits


def test_who_waits_finds_its_adapter_resident() -> None:
    world = World()
    for digest in (A, B, C):
        world.stage(digest)
        world.add(digest[0], digest)
    world.step()
    assert world.loads == [(A, B, C)], "what the plan needs first, then in the order of the queue"
    assert world.counts == (1, 2, 0)
    world.run()
    assert sum(world.loads, ()) == (A, B, C)
    assert world.counts == (1, 2, 2)


def test_a_load_starts_when_its_request_arrives_beside_a_step_in_flight_even_without_a_plan() -> None:
    world = World()
    world.stage(A)
    world.add("base", max_tokens=1)
    plan = world.schedule().plan
    assert plan is not None
    world.executor.submit(plan)
    world.add("a", A)
    assert world.schedule().plan is None
    assert world.loads == [(), (A,)]
    world.take(world.engine.complete(world.executor.collect(), world.now_s))
    world.run()
    assert world.counts == (0, 1, 1)


@pytest.mark.parametrize(("num_pages", "loaded"), [(14, False), (15, True)])
def test_what_a_nearer_request_needs_is_not_taken(num_pages: int, loaded: bool) -> None:
    """Two pages run, one is kept in reserve, ten are for the nearer request: an adapter of two must find them free."""
    world = World(num_pages=num_pages)
    world.stage(A)
    world.add("runs")
    world.step()
    world.add("nearer", prompt=40, max_tokens=1)
    world.now_s += 1
    world.add("later", A, max_tokens=1, tenant="other")
    world.engine._scheduler.counters.charge(TenantName("other"), 1e6)
    world.step()
    assert world.loads[1] == ((A,) if loaded else ())
    world.run()


def test_adapters_that_nobody_waits_for_give_way_and_those_of_nearer_requests_do_not() -> None:
    world = World(num_pages=16, max_adapter_pages=4)
    for digest in (A, B):
        world.stage(digest)
        world.add(digest[0], digest, max_tokens=1)
        world.run()
    assert world.engine.resident_adapters() == (A, B)
    world.stage(C)
    world.add("base", max_tokens=20)
    world.step()
    world.add("a again", A)
    world.now_s += 1
    world.add("c", C)
    world.step()
    assert world.drops == [B], "A is older, and waited for"
    assert world.loads[-1] == (C,)
    world.run()
    assert world.counts == (2, 1, 2)


def test_cached_prefixes_of_nearer_requests_outlive_a_load_ahead() -> None:
    world = World(num_pages=16, prefix_cache=True)
    world.add("old", prompt=17, max_tokens=1)
    world.run()
    world.add("younger", prompt=20, max_tokens=1, tenant="y")
    world.run()
    world.stage(A, pages=5)
    world.add("base", prompt=5, max_tokens=20, tenant="z")
    world.step()
    world.add("old again", prompt=17, max_tokens=1)
    world.now_s += 1
    world.add("a", A, tenant="late")
    world.engine._scheduler.counters.charge(TenantName("late"), 1e6)
    world.step()
    assert world.loads[-1] == (A,)
    world.run()
    assert world.ended["old again"].num_cached_tokens == 16


def test_so_many_pages_ahead_and_no_more() -> None:
    world = World(max_ahead_pages=4)
    digests = [Digest(f"{i:064d}") for i in range(5)]
    world.add("base", max_tokens=6)
    for digest in digests:
        world.stage(digest)
        world.add(digest, digest, max_tokens=2)
    world.step(3)
    assert world.loads == [tuple(digests[:2]), (), ()]
    world.run()
    assert world.counts == (0, 5, 5), "as one is used the next one comes"
    off = World(max_ahead_pages=0)
    off.stage(A)
    off.add("base")
    off.add("a", A)
    off.step()
    assert off.loads == [()]


def test_an_adapter_larger_than_the_bound_is_loaded_ahead_alone() -> None:
    world = World(max_ahead_pages=1)
    for digest in (A, B):
        world.stage(digest, pages=3)
    world.add("base")
    world.add("a", A)
    world.now_s += 1
    world.add("b", B)
    world.step()
    assert world.loads == [(A,)]
    world.run()


def test_pages_that_are_lost_again_are_not_loaded_ahead_twice() -> None:
    """The running one grows over them: whoever waits loads its adapter at its admission."""
    world = World(num_pages=8)
    world.stage(A, pages=4)
    world.add("grows", prompt=8, max_tokens=24)
    world.add("a", A)
    world.run()
    assert world.counts == (1, 1, 0)
    assert sum(world.loads, ()) == (A, A)


def test_an_aborted_request_leaves_its_adapter_resident_and_out_of_the_count() -> None:
    world = World(max_ahead_pages=2)
    for digest in (A, B):
        world.stage(digest)
    world.add("base", max_tokens=9)
    world.add("a", A)
    world.step()
    world.take(world.engine.abort(RequestId("a")))
    world.requests = [request for request in world.requests if request.request_id != "a"]
    world.add("b", B)
    world.step()
    assert world.loads == [(A,), (B,)]
    assert set(world.engine.resident_adapters()) == {A, B}
    world.run()


def test_a_load_ahead_that_fails_ends_those_who_wait_for_it_and_nobody_else() -> None:
    world = World()
    world.stage(A)
    world.add("base", max_tokens=1)
    plan = world.schedule().plan
    assert plan is not None
    world.executor.submit(plan)
    world.add("a", A)
    assert world.engine.schedule(world.now_s).plan is None
    world.take(world.engine.loads_failed({A: LoraplexError("the copy failed")}))
    world.engine.validate()
    assert world.ended["a"].finish_reason is FinishReason.ERROR
    world.take(world.engine.complete(world.executor.collect(), world.now_s))
    assert world.ended["base"].finish_reason is FinishReason.LENGTH
    world.executor.unstage_adapter(A)
    world.add("again", A)
    assert world.engine.wanted_adapters() == (A,)


@pytest.mark.parametrize("max_ahead_pages", [0, 512])
@pytest.mark.parametrize("num_pages", [12, 64])
def test_a_cold_adapter_runs_in_bounded_time_under_a_flood(num_pages: int, max_ahead_pages: int) -> None:
    """Hot requests never end and take every page that they can; the cold one's turn comes when it is overdue, and then
    nobody passes it: it runs as soon as those that run have ended."""
    overdue, hot_tokens, max_running = 8, 6, 3
    world = World(
        num_pages=num_pages,
        max_running=max_running,
        overdue_s=float(overdue),
        adapter_page_price=1e6,
        max_ahead_pages=max_ahead_pages,
    )
    for digest in (A, B, C):
        world.stage(digest, pages=3)
    count = 0

    def flood() -> None:
        nonlocal count
        while world.engine.num_unfinished < 12:
            world.add(f"hot{count}", (A, B)[count % 2], max_tokens=hot_tokens, tenant=f"t{count % 3}")
            count += 1

    flood()
    world.step(3)
    world.add("cold", C, max_tokens=2, tenant="cold")
    steps = 0
    while "cold" not in world.tokens:
        flood()
        world.step()
        steps += 1
        assert steps <= overdue + hot_tokens + 2, "the cold adapter starves"
    assert world.executor.violations == []
