import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.adapter import AdapterRef
from loraplex.core.ids import BaseModelId, Digest, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.router.policy import ReplicaView, choose_replica


def make(*, adapter: str | None = None, prompt: tuple[int, ...] = (1, 2, 3), salt: str = "t") -> EngineRequest:
    ref = None
    if adapter is not None:
        ref = AdapterRef(tenant=TenantName("t"), name="a", version=1, digest=Digest(adapter))
    return EngineRequest(
        request_id=RequestId("r"),
        tenant=TenantName("t"),
        base_model_id=BaseModelId("b"),
        adapter=ref,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=1, seed=0),
        arrival_s=0.0,
        cache_salt=salt,
    )


def view(name: str, *, resident: bool = True, load: int = 0, credits: int = 10) -> ReplicaView:
    return ReplicaView(replica_id=ReplicaId(name), resident=resident, load=load, credits=credits)


def choose(*views: ReplicaView, request: EngineRequest | None = None) -> str | None:
    return choose_replica(views, request or make(adapter="x"), load_slack=2, load_bound=1.25)


views = st.builds(
    ReplicaView,
    replica_id=st.text("abcdef", min_size=1).map(ReplicaId),
    resident=st.booleans(),
    load=st.integers(0, 50),
    credits=st.integers(-2, 3),
)


@given(st.lists(views, max_size=6, unique_by=lambda v: v.replica_id), st.permutations(range(6)))
def test_the_choice_has_a_credit_is_never_far_from_the_least_loaded_and_ignores_order(
    found: list[ReplicaView], order: list[int]
) -> None:
    chosen = choose(*found)
    takers = {v.replica_id: v for v in found if v.credits > 0}
    if not takers:
        assert chosen is None
        return
    assert chosen is not None
    least = min(v.load for v in takers.values())
    mean = sum(v.load for v in found) / len(found)
    assert takers[ReplicaId(chosen)].load <= max(least, 1.25 * mean) + 2
    assert choose(*(found[i] for i in order if i < len(found))) == chosen


def test_the_adapter_is_worth_more_than_a_few_requests_of_load() -> None:
    assert choose(view("a", load=3), view("b", load=2, resident=False)) == "a"


def test_a_hot_adapter_spreads() -> None:
    assert choose(view("a", load=20), view("b", load=2, resident=False), view("c", load=1, resident=False)) in (
        "b",
        "c",
    )


def test_alike_replicas_are_told_apart_by_prefix() -> None:
    replicas = [view(name) for name in "abcd"]
    homes = Counter(choose(*replicas, request=make(prompt=(i, 1, 2))) for i in range(400))
    assert len(homes) == 4
    assert min(homes.values()) > 50
    # A conversation that grows behind the first tokens stays.
    head = tuple(range(64))
    assert len({choose(*replicas, request=make(prompt=(*head, *range(n)))) for n in range(20)}) == 1
    # A replica that goes moves only what it had.
    for i in range(100):
        before = choose(*replicas, request=make(prompt=(i,)))
        after = choose(*replicas[:-1], request=make(prompt=(i,)))
        assert before in ("d", after)


def test_a_cold_adapter_has_one_home_whatever_the_prompt() -> None:
    replicas = [view(name, resident=False) for name in "abcd"]
    assert len({choose(*replicas, request=make(adapter="x", prompt=(i,))) for i in range(30)}) == 1
    assert len({choose(*replicas, request=make(adapter=f"x{i}")) for i in range(50)}) == 4


def test_a_choice_is_cheap() -> None:
    replicas = [view(f"replica-{i}", load=i % 3) for i in range(16)]
    request = make(prompt=tuple(range(1000)))
    started_s = time.process_time()
    for _ in range(200):
        choose(*replicas, request=request)
    assert time.process_time() - started_s < 0.5


def test_weights_divide_cold_adapters_in_proportion() -> None:
    light = ReplicaView(replica_id=ReplicaId("a"), resident=False, load=0, credits=9)
    heavy = ReplicaView(replica_id=ReplicaId("b"), resident=False, load=0, credits=9, weight=3.0)
    chosen = Counter(choose(light, heavy, request=make(adapter=f"x{i}")) for i in range(4000))
    assert 0.72 < chosen["b"] / 4000 < 0.78
