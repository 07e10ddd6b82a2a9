"""What the engine promises, one promise a test; the fake executor checks every plan."""

from dataclasses import replace

import pytest
from loraplex.core.adapter import AdapterRef
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
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, Priority, RequestOutput, SamplingParams
from loraplex.core.step import StepPlan
from loraplex.engine import Engine, EngineConfig
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens, fake_manifest, fake_model
from loraplex.testing.steps import run_step

A, B = Digest("a" * 64), Digest("b" * 64)


class Harness:
    """An engine and an executor, stepped by hand; one step takes one second."""

    def __init__(self, *, num_pages: int = 64, page_size: int = 4, **config: float) -> None:
        self.executor = FakeExecutor(model=fake_model(max_context_tokens=256), num_pages=num_pages, page_size=page_size)
        settings = {"max_running": 8, "max_step_tokens": 64, **config}
        self.engine = Engine(
            EngineConfig(**settings),  # type: ignore[arg-type]
            model=self.executor.model,
            arena=self.executor.arena,
        )
        self.now_s = 0.0
        self.tokens: dict[str, list[int]] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.plans: list[StepPlan] = []
        self.loads: list[Digest] = []
        self.drops: list[Digest] = []
        self.slots: dict[int, str] = {}

    def stage(self, digest: Digest, *, lora_rank: int = 8) -> None:
        manifest = fake_manifest(digest, lora_rank=lora_rank)
        self.executor.stage_adapter(manifest, "")
        self._take(self.engine.adapter_staged(digest, self.executor.adapter_pages(manifest), self.now_s))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.now_s += 1.0
            instructions = self.engine.schedule(self.now_s)
            for digest in instructions.drops:
                self.executor.drop_adapter(digest)
            for digest in instructions.unstages:
                self.executor.unstage_adapter(digest)
            for load in instructions.loads:
                self.executor.load_adapter(load.digest, load.pages)
            self.drops.extend(instructions.drops)
            self.loads.extend(load.digest for load in instructions.loads)
            if instructions.plan is None:
                return
            self.plans.append(instructions.plan)
            self._take(self.engine.complete(run_step(self.executor, instructions.plan), self.now_s))
            self.engine.validate()

    def add(self, request: EngineRequest) -> EngineRequest:
        self.engine.add(request, self.now_s)
        return request

    def run(self, limit: int = 500) -> None:
        for _ in range(limit):
            if self.engine.num_unfinished == 0:
                return
            self.step()
        pytest.fail("requests are left")

    def check(self, *requests: EngineRequest) -> None:
        for request in requests:
            expected = expected_tokens(request, request.sampling.max_tokens)
            assert tuple(self.tokens[request.request_id]) == expected

    def running_rows(self) -> int:
        return len(self.plans[-1].rows)

    def _take(self, outputs: tuple[RequestOutput, ...]) -> None:
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
            self.outputs.setdefault(output.request_id, []).append(output)


def make(
    name: str,
    *,
    prompt: tuple[int, ...] | int = 8,
    max_tokens: int = 4,
    tenant: str = "t",
    weight: float = 1.0,
    adapter: Digest | None = None,
    salt: str | None = None,
    offline: bool = False,
    arrival_s: float = 0.0,
) -> EngineRequest:
    ref = None
    if adapter is not None:
        ref = AdapterRef(tenant=TenantName(tenant), name="a", version=1, digest=adapter)
    return EngineRequest(
        request_id=RequestId(name),
        tenant=TenantName(tenant),
        base_model_id=BaseModelId("fake-base"),
        adapter=ref,
        prompt_token_ids=tuple(range(prompt)) if isinstance(prompt, int) else prompt,
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        arrival_s=arrival_s,
        cache_salt=tenant if salt is None else salt,
        priority=Priority.OFFLINE if offline else Priority.ONLINE,
        weight=weight,
    )


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


def test_equal_prefixes_of_one_tenant_are_computed_once() -> None:
    harness = Harness()
    requests = [harness.add(make("a", prompt=17))]
    harness.run()
    requests.append(harness.add(make("b", prompt=17)))
    requests.append(harness.add(make("c", prompt=(*range(9), 99, 98, 97))))
    requests.append(harness.add(make("d", prompt=16)))
    harness.run()
    cached = {name: outputs[0].num_cached_tokens for name, outputs in harness.outputs.items()}
    # At least one token is computed: of 16 known tokens only the first three pages can be shared.
    assert cached == {"a": 0, "b": 16, "c": 8, "d": 12}
    assert all(output.num_cached_tokens == 0 for output in harness.outputs["b"][1:])
    harness.check(*requests)


def test_generated_tokens_are_found_again_by_the_next_turn() -> None:
    harness = Harness()
    first = harness.add(make("a", prompt=8, max_tokens=9))
    harness.run()
    turn = (*first.prompt_token_ids, *harness.tokens["a"], 5, 6, 7)
    harness.add(make("b", prompt=turn))
    harness.run()
    assert harness.outputs["b"][0].num_cached_tokens == 16


@pytest.mark.parametrize("other", [{"salt": "other"}, {"adapter": A}, {"tenant": "u", "adapter": B}])
def test_nothing_is_shared_across_salts_and_adapters(other: dict[str, str]) -> None:
    harness = Harness()
    harness.stage(A)
    harness.stage(B)
    harness.add(make("a", prompt=17))
    harness.run()
    harness.add(make("b", prompt=17, **other))  # type: ignore[arg-type]
    harness.run()
    assert harness.outputs["b"][0].num_cached_tokens == 0


def test_equal_prompts_that_come_at_once_are_computed_once() -> None:
    world = Harness(max_step_tokens=16, overdue_s=100)
    siblings = [world.add(make(f"s{i}", prompt=40, max_tokens=6)) for i in range(5)]
    other = world.add(make("other", prompt=(100, 101, 102, 103), max_tokens=6))
    world.step(3)
    assert set(world.tokens) == {"s0", "other"}, "who waits for pages holds nobody up"
    world.run()
    world.check(*siblings, other)
    prefilled = sum(len(row.token_ids) for plan in world.plans for row in plan.rows if len(row.token_ids) > 1)
    assert prefilled == 40 + 4 * 4 + 4, "the prompt once, its last page for each sibling, and the other's"


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_when_the_request_that_computes_for_others_ends_they_go_on(end: str) -> None:
    world = Harness(max_step_tokens=16, overdue_s=100)
    first, second, third = (world.add(make(f"s{i}", prompt=40)) for i in range(3))
    world.step()
    assert world.running_rows() == 1
    if end == "abort":
        world.engine.abort(first.request_id)
    else:
        assert world.engine.schedule(world.now_s).plan is not None
        (output,) = world.engine.step_failed(LoraplexError("it broke"))
        assert output.request_id == first.request_id
    world.run()
    world.check(second, third)


def test_nobody_waits_for_equal_pages_longer_than_until_it_is_overdue() -> None:
    world = Harness(max_step_tokens=64, overdue_s=4)
    world.add(make("patient", prompt=40, arrival_s=100.0))
    rows = []
    for index in range(6):
        # One that goes first each time, and is given up in the very step that computes it.
        hasty = world.add(make(f"hasty{index}", prompt=40, arrival_s=float(index)))
        world.now_s += 1.0
        plan = world.engine.schedule(world.now_s).plan
        assert plan is not None
        rows.append(len(plan.rows))
        world.engine.abort(hasty.request_id)
        world._take(world.engine.complete(run_step(world.executor, plan), world.now_s))
    assert rows[:4] == [1, 1, 1, 2]
    world.run()


def test_an_online_request_does_not_wait_for_what_an_offline_one_computes() -> None:
    world = Harness(max_step_tokens=8)
    world.add(make("offline", prompt=40, offline=True))
    world.step()
    world.add(make("online", prompt=40))
    world.step()
    assert world.running_rows() == 1
    assert world.plans[-1].rows[0].start == 8, "it goes on where the other is"


def test_prefix_cache_can_be_off() -> None:
    harness = Harness(prefix_cache=False)
    for name in "ab":
        harness.add(make(name, prompt=17))
        harness.run()
    assert harness.outputs["b"][0].num_cached_tokens == 0
    assert harness.engine.load_report().num_free_pages == 64


def test_short_of_pages_the_latest_gives_way_and_loses_nothing() -> None:
    harness = Harness(num_pages=12, prefix_cache=False)
    requests = [
        harness.add(make(name, prompt=8, max_tokens=24, arrival_s=arrival_s, tenant=name))
        for arrival_s, name in enumerate("abc")
    ]
    finished: list[str] = []
    while harness.engine.num_unfinished:
        harness.step()
        finished.extend(n for n, o in harness.outputs.items() if o[-1].finish_reason and n not in finished)
    assert finished == ["a", "b", "c"]
    assert harness.engine.num_preemptions > 0
    harness.check(*requests)


def test_online_goes_first_and_takes_pages_from_offline() -> None:
    harness = Harness(num_pages=16)
    offline = [harness.add(make(f"off{i}", prompt=20, max_tokens=8, offline=True, tenant=f"o{i}")) for i in range(2)]
    harness.step(2)
    assert harness.running_rows() == 2
    online = harness.add(make("on", prompt=30, max_tokens=8, tenant="x", arrival_s=9.0))
    harness.step()
    assert harness.engine.num_preemptions == 1
    assert len(harness.outputs["on"]) == 1
    harness.run()
    harness.check(*offline, online)


def test_offline_is_not_preempted_in_vain() -> None:
    harness = Harness(num_pages=30, max_step_tokens=256)
    harness.add(make("on0", prompt=tuple(range(500, 548)), max_tokens=30, tenant="z"))
    harness.step()
    for i in range(4):
        harness.add(make(f"off{i}", prompt=41, max_tokens=30, offline=True))
        harness.step()
    # Their page tables have 44 entries, of 14 pages: ten are shared.
    assert harness.running_rows() == 5
    harness.add(make("on1", prompt=tuple(range(600, 690)), max_tokens=4, tenant="x"))
    harness.step()
    assert harness.engine.num_preemptions == 0
    harness.run()


def test_online_takes_the_pages_of_adapters_that_only_offline_uses() -> None:
    harness = Harness(num_pages=16)
    harness.stage(A, lora_rank=64)
    offline = harness.add(make("off", adapter=A, max_tokens=20, offline=True))
    harness.step()
    online = harness.add(make("on", prompt=44, tenant="x"))
    harness.step()
    assert "on" in harness.outputs
    harness.run()
    harness.check(offline, online)


def test_online_takes_the_slot_of_offline() -> None:
    harness = Harness(max_running=1)
    harness.add(make("off", max_tokens=20, offline=True))
    harness.step(2)
    harness.add(make("on", tenant="u"))
    harness.step()
    assert "on" in harness.outputs
    harness.run()
    assert len(harness.tokens["off"]) == 20


@pytest.mark.parametrize("overdue_s", [0.0, 2.0, 1e9])
def test_tenants_share_the_engine_by_tokens_however_long_they_queue(overdue_s: float) -> None:
    harness = Harness(max_running=1, max_step_tokens=16, overdue_s=overdue_s, prefix_cache=False)
    for i in range(30):
        harness.add(make(f"many{i}", tenant="many"))
    for i in range(3):
        harness.add(make(f"few{i}", tenant="few"))
    harness.step(24)
    done = [name for name, outputs in harness.outputs.items() if outputs[-1].finish_reason is not None]
    assert sum(name.startswith("few") for name in done) == 3
    assert len(done) == 6


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_what_is_free_at_once_is_shared_by_tenants_and_their_weights(weight: float) -> None:
    harness = Harness(max_running=8, max_step_tokens=256, prefix_cache=False)
    for tenant in ("many", "few"):
        for i in range(12):
            harness.add(make(f"{tenant}{i}", tenant=tenant, weight=weight if tenant == "few" else 1.0, max_tokens=40))
    harness.step()
    assert sum(name.startswith("few") for name in harness.outputs) == 8 * weight / (1.0 + weight)


def test_tenants_share_the_engine_by_their_weights() -> None:
    harness = Harness(max_running=1, max_step_tokens=16, prefix_cache=False)
    for i in range(24):
        harness.add(make(f"one{i}", tenant="one"))
        harness.add(make(f"three{i}", tenant="three", weight=3.0))
    harness.step(120)
    done = [name for name, outputs in harness.outputs.items() if outputs[-1].finish_reason is not None]
    assert len(done) >= 20
    assert sum(name.startswith("three") for name in done) == pytest.approx(0.75 * len(done), abs=2)


def test_a_large_request_is_not_passed_for_ever_by_small_ones() -> None:
    harness = Harness(num_pages=20, max_running=4, overdue_s=10.0, prefix_cache=False)
    for i in range(3):
        harness.add(make(f"first{i}", prompt=12, max_tokens=8, tenant=f"small{i}"))
    harness.step()
    harness.add(make("large", prompt=64, max_tokens=4, tenant="large"))
    small = 0
    while "large" not in harness.outputs and harness.now_s < 60:
        while harness.engine.num_unfinished < 6:
            harness.add(make(f"{small}", prompt=12, max_tokens=8, tenant=f"small{small % 3}", arrival_s=harness.now_s))
            small += 1
        harness.step()
    assert small > 3
    assert 11.0 <= harness.now_s <= 22.0


def test_idleness_saves_nothing_up() -> None:
    harness = Harness(max_running=1, overdue_s=1e9, prefix_cache=False)
    harness.add(make("old0", tenant="old"))
    for i in range(10):
        harness.add(make(f"busy{i}", tenant="busy"))
    harness.step(20)
    for i in range(1, 6):
        harness.add(make(f"old{i}", tenant="old"))
    before = len(harness.outputs)
    harness.step(16)
    after = [name for name in list(harness.outputs)[before:] if name.startswith("old")]
    assert 1 <= len(after) <= 2


def test_a_cold_adapter_costs_a_price_but_waits_a_bounded_time() -> None:
    harness = Harness(max_running=2, overdue_s=12.0, adapter_page_price=1e6, prefix_cache=False)
    harness.stage(A)
    harness.stage(B)
    harness.add(make("long", adapter=A, max_tokens=100, tenant="long"))
    harness.step()
    hot = 0
    harness.add(make("cold", adapter=B, tenant="cold"))
    added_s = harness.now_s
    while "cold" not in harness.outputs:
        while harness.engine.num_unfinished < 6:
            harness.add(make(f"hot{hot}", adapter=A, max_tokens=3, tenant=f"hot{hot % 2}"))
            hot += 1
        harness.step()
    waited_s = harness.now_s - added_s
    assert 12.0 <= waited_s <= 16.0


def test_only_requests_of_an_unstaged_adapter_wait() -> None:
    harness = Harness()
    cold = harness.add(make("cold", adapter=A))
    warm = harness.add(make("warm"))
    assert harness.engine.wanted_adapters() == (A,)
    assert harness.engine.wanted_adapters() == ()
    harness.step(4)
    harness.check(warm)
    assert "cold" not in harness.outputs
    harness.stage(A)
    harness.run()
    harness.check(cold)


def test_idle_adapters_stay_until_their_pages_are_needed() -> None:
    harness = Harness(num_pages=10, prefix_cache=False)
    for digest in (A, B):
        harness.stage(digest, lora_rank=24)
        harness.add(make(digest, adapter=digest))
        harness.run()
    harness.add(make("again", adapter=A))
    harness.run()
    assert harness.loads == [A, B]
    assert harness.engine.load_report().num_free_pages == 10
    # Seven pages of KV leave room for one adapter: the one used last stays.
    harness.add(make("big", prompt=20, max_tokens=8))
    harness.run()
    assert harness.drops == [B]
    assert harness.engine.resident_adapters() == (A,)


def test_adapters_take_the_pages_of_cached_prefixes() -> None:
    harness = Harness(num_pages=10)
    harness.add(make("a", prompt=30, max_tokens=8))
    harness.run()
    harness.stage(A, lora_rank=40)
    request = harness.add(make("b", adapter=A))
    harness.run()
    harness.check(request)


def test_host_memory_is_bounded() -> None:
    harness = Harness(max_host_pages=3, num_pages=16)
    digests = [Digest(f"{i:064d}") for i in range(6)]
    for digest in digests:
        harness.stage(digest)
        harness.add(make(digest, adapter=digest))
        harness.run()
    harness.add(make("big", prompt=40, max_tokens=20))
    harness.run()
    assert len(harness.executor.staged) <= 3
    harness.add(make("again", adapter=digests[0]))
    assert harness.engine.wanted_adapters() == (digests[0],)


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


def test_a_request_that_cannot_fit_beside_its_adapter_ends_when_that_is_known() -> None:
    harness = Harness(num_pages=10)
    harness.add(make("x", prompt=20, max_tokens=8, adapter=A))
    harness.stage(A, lora_rank=40)
    (output,) = harness.outputs["x"]
    assert output.finish_reason is FinishReason.ERROR
    assert "needs" in str(output.error) or "need" in str(output.error)
    assert output.error_code == ContextTooLong.code
    with pytest.raises(ContextTooLong):
        harness.add(make("y", prompt=20, max_tokens=8, adapter=A))


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
