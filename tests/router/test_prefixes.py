from loraplex.core.ids import BaseModelId, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.router.prefixes import PrefixMap, prefixes_of

A, B = ReplicaId("a"), ReplicaId("b")


def make(prompt: range, *, salt: str = "t") -> EngineRequest:
    return EngineRequest(
        request_id=RequestId("r"),
        tenant=TenantName("t"),
        base_model_id=BaseModelId("b"),
        adapter=None,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=1, seed=0),
        arrival_s=0.0,
        cache_salt=salt,
    )


def test_a_conversation_finds_what_it_has_in_common_with_its_past() -> None:
    known = PrefixMap(100)
    known.sent(prefixes_of(make(range(300))), A)
    known.sent(prefixes_of(make(range(70))), B)
    assert known.saved_tokens(prefixes_of(make(range(1000)))) == {A: 256, B: 64}
    assert known.saved_tokens(prefixes_of(make(range(200)))) == {A: 128, B: 64}
    assert known.saved_tokens(prefixes_of(make(range(63)))) == {}
    assert known.saved_tokens(prefixes_of(make(range(1, 301)))) == {}
    assert known.saved_tokens(prefixes_of(make(range(300), salt="u"))) == {}
    known.forget(A)
    assert known.saved_tokens(prefixes_of(make(range(1000)))) == {B: 64}
    known.forget(B)
    assert len(known) == 0


def test_it_stays_within_its_size_and_forgets_the_oldest() -> None:
    known = PrefixMap(4)
    for start in range(6):
        known.sent(prefixes_of(make(range(start, start + 128))), A)
    assert len(known) == 4
    assert known.saved_tokens(prefixes_of(make(range(5, 133)))) == {A: 128}
    assert known.saved_tokens(prefixes_of(make(range(3, 131)))) == {}
    off = PrefixMap(0)
    off.sent(prefixes_of(make(range(128))), A)
    assert len(off) == 0


def test_the_last_of_many_replicas_are_kept() -> None:
    known = PrefixMap(100)
    found = prefixes_of(make(range(64)))
    for name in "abcdea":
        known.sent(found, ReplicaId(name))
    assert known.saved_tokens(found) == dict.fromkeys(map(ReplicaId, "acde"), 64)
