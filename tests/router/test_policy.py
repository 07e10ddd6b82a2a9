import dataclasses
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.adapter import AdapterRef
from loraplex.core.ids import BaseModelId, Digest, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.router.config import RouterConfig
from loraplex.router.policy import Demand, ReplicaView, affinity, choose_replica, hash64, predict, prefix_key
from loraplex.router.prediction import Rates

RATES = Rates(step_s=0.006, row_s=5e-6, context_token_s=5e-8, token_s=3e-5, free_tokens=170, max_running=64)
CONFIG = RouterConfig(alike_s=0.001)
ADAPTER = Digest("x")
LOAD_S = 0.05


def view(
    name: str, *, resident: bool = True, rows: int = 0, queued: float = 0.0, credits: int = 10, rates: Rates = RATES
) -> ReplicaView:
    return ReplicaView(
        replica_id=ReplicaId(name),
        rates=rates,
        rows=rows,
        queued_tokens=queued,
        prompt_tokens=256.0 * rows,
        credits=credits,
        resident={ADAPTER} if resident else (),
        absence_s=lambda digest: LOAD_S,
    )


def demand(
    *,
    key: int = 1,
    prompt: int = 256,
    plain: bool = False,
    saved: dict[ReplicaId, int] | None = None,
    weights: dict[ReplicaId, float] | None = None,
) -> Demand:
    return Demand(
        key=key,
        prompt_tokens=prompt,
        output_tokens=128.0,
        digest=None if plain else ADAPTER,
        saved_tokens=saved or {},
        weights=weights,
    )


def choose(*views: ReplicaView, want: Demand | None = None) -> str | None:
    choice = choose_replica(views, want or demand(), CONFIG)
    return None if choice is None else choice.view.replica_id


views = st.builds(
    view,
    st.text("abcdef", min_size=1),
    resident=st.booleans(),
    rows=st.integers(0, 90),
    queued=st.floats(0, 1e5),
    credits=st.integers(-2, 3),
)


@given(st.lists(views, max_size=6, unique_by=lambda v: v.replica_id), st.permutations(range(6)))
def test_the_choice_has_a_credit_is_predicted_to_be_soonest_and_ignores_order(
    found: list[ReplicaView], order: list[int]
) -> None:
    chosen = choose_replica(found, demand(), CONFIG)
    takers = [v for v in found if v.credits > 0]
    assert (chosen is None) == (not takers)
    if chosen is None:
        return
    assert chosen.view in takers

    def score(v: ReplicaView) -> float:
        first_s, decode_s = predict(v, demand())
        return first_s + CONFIG.decode_weight * 128.0 * decode_s + LOAD_S * (ADAPTER not in v.resident)

    # An adapter stays at home for a bit, and replicas that are alike are told apart by other means.
    assert score(chosen.view) <= min(map(score, takers)) + 2 * CONFIG.alike_s + 1e-12
    again = choose_replica([found[i] for i in order if i < len(found)], demand(), CONFIG)
    assert again is not None
    assert again.view is chosen.view


@given(views, st.integers(0, 200), st.floats(0, 1e4), st.integers(1, 4000))
def test_more_work_there_is_never_predicted_to_be_sooner(v: ReplicaView, rows: int, queued: float, prompt: int) -> None:
    more = dataclasses.replace(v, rows=v.rows + rows, queued_tokens=v.queued_tokens + queued)
    more.prompt_tokens = v.prompt_tokens + 256.0 * rows
    for one, other in ((v, more), (v, dataclasses.replace(v, room_tokens=100.0))):
        assert predict(one, demand(prompt=prompt))[0] <= predict(other, demand(prompt=prompt))[0] + 1e-12
    assert predict(v, demand(prompt=prompt))[0] <= predict(v, demand(prompt=prompt + 100))[0] + 1e-12


def test_a_full_replica_is_waited_for_as_long_as_its_requests_live() -> None:
    life_s = 128 * predict(view("a", rows=64), demand())[1]
    first_s = predict(view("a", rows=64), demand())[0]
    assert 0.9 * life_s / 64 < first_s - predict(view("a", rows=63), demand())[0] < 1.1 * life_s / 64
    assert predict(view("a", rows=127), demand())[0] > 0.9 * life_s


def test_an_adapter_stays_at_home_until_the_wait_there_costs_more_than_its_load_elsewhere() -> None:
    # 50 ms of load: about 1,650 prompt tokens.
    assert choose(view("a", queued=1000), view("b", resident=False)) == "a"
    assert choose(view("a", queued=3000), view("b", resident=False)) == "b"
    # Requests on their way make a home as well.
    coming = dataclasses.replace(view("b", resident=False), sent={ADAPTER: 1})
    assert choose(view("a", queued=500), coming) == "b"
    # Forty others under way would use it as well: it counts a fifth.
    assert choose(dataclasses.replace(view("a", queued=1000), sent={ADAPTER: 1}), view("b", resident=False)) == "a"
    busy = dataclasses.replace(view("a", queued=1000), sent={ADAPTER: 40})
    assert choose(busy, view("b", resident=False)) == "b"
    choice = choose_replica((busy, view("b", resident=False)), demand(), CONFIG)
    assert choice is not None
    assert choice.first_s > LOAD_S


def test_a_hot_adapter_gets_as_many_homes_as_it_needs_and_a_cool_one_uses_the_first() -> None:
    replicas = [view(name, resident=False) for name in "abcd"]
    for _ in range(12):
        choice = choose_replica(replicas, demand(prompt=1000), CONFIG)
        assert choice is not None
        choice.view.queued_tokens += 1000
        choice.view.rows += 1
        choice.view.sent = {ADAPTER: 1}
    assert [bool(v.sent) for v in replicas] == [True] * 4
    idle = [view(name) for name in "abcd"]
    want = demand(key=hash64(b"x"))
    assert len({choose(*idle, want=dataclasses.replace(want, prompt_tokens=n)) for n in range(1, 50)}) == 1


def test_prompts_go_where_their_prefix_was() -> None:
    replicas = [view(name) for name in "abcd"]
    for name in "abcd":
        saved = {ReplicaId(name): 1500}
        assert choose(*replicas, want=demand(prompt=2000, saved=saved)) == name
    busy = [view("a", rows=8, queued=5000), view("b")]
    assert choose(*busy, want=demand(prompt=2000, saved={ReplicaId("a"): 1500})) == "b"


def test_a_faster_replica_gets_more() -> None:
    fast = dataclasses.replace(RATES, step_s=0.003, token_s=1.5e-5)
    assert choose(view("a", queued=1000), view("b", queued=1500, rates=fast)) == "b"
    assert choose(view("a", queued=1000), view("b", queued=6000, rates=fast)) == "a"


def test_alike_replicas_are_told_apart_by_key() -> None:
    replicas = [view(name) for name in "abcd"]
    homes = Counter(choose(*replicas, want=demand(key=hash64(bytes([i % 256, i // 256])))) for i in range(400))
    assert len(homes) == 4
    assert min(homes.values()) > 50
    # A replica that goes moves only what it had.
    for i in range(100):
        before = choose(*replicas, want=demand(key=i))
        after = choose(*replicas[:-1], want=demand(key=i))
        assert before in ("d", after)


def test_weights_divide_in_proportion() -> None:
    weights = {ReplicaId("a"): 1.0, ReplicaId("b"): 3.0}
    chosen = Counter(choose(view("a"), view("b"), want=demand(key=i, weights=weights)) for i in range(4000))
    assert 0.72 < chosen["b"] / 4000 < 0.78
    assert affinity(b"k", ReplicaId("a"), 3.0) == 3.0 * affinity(b"k", ReplicaId("a"))


def test_equal_heads_of_one_tenant_and_adapter_have_one_key() -> None:
    def key(prompt: tuple[int, ...], *, salt: str = "t", adapter: str | None = None) -> int:
        ref = None
        if adapter is not None:
            ref = AdapterRef(tenant=TenantName("t"), name="a", version=1, digest=Digest(adapter))
        return prefix_key(
            EngineRequest(
                request_id=RequestId("r"),
                tenant=TenantName("t"),
                base_model_id=BaseModelId("b"),
                adapter=ref,
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=1, seed=0),
                arrival_s=0.0,
                cache_salt=salt,
            )
        )

    head = tuple(range(64))
    assert key(head) == key((*head, 7, 8)) != key(head[:-1])
    assert len({key(head), key(head, salt="u"), key(head, adapter="x")}) == 3
