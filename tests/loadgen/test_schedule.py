"""Who stands for whom, what is sent when, and prompts of the right length."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.errors import BadConfig, NotFound
from loraplex.loadgen.config import ReplayConfig, RequestConfig
from loraplex.loadgen.prompts import TokenizerPrompts, WordPrompts
from loraplex.loadgen.schedule import plan_replay
from loraplex.loadgen.targets import Target, assign_targets, read_key_file, targets_of
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer
from loraplex.traces.arrivals import TraceRequest

_TARGETS = tuple(
    Target(tenant=tenant, model=model, key=f"key-{tenant}")
    for tenant, models in (("acme", ("base", "pirate")), ("globex", ("base", "lawyer", "poet")))
    for model in models
)


def _request(
    tenant: str | None, adapter: str | None, at_s: float = 0.0, tokens: int | None = 5, base: str | None = None
) -> TraceRequest:
    return TraceRequest(
        arrival_s=at_s, tenant=tenant, base_model=base, adapter=adapter, prompt_tokens=tokens, output_tokens=tokens
    )


def test_own_trace_keeps_its_names() -> None:
    requests = [
        _request("acme", "pirate"),
        _request("globex", "poet"),
        _request("globex", None, base="base"),
        _request("acme", None, base="base"),
    ]
    for entry in assign_targets(requests, _TARGETS):
        assert entry.target.tenant == entry.trace_tenant
        assert entry.target.model == (entry.trace_adapter or "base")


def test_strangers_take_turns_busiest_first() -> None:
    requests = [_request("x", "a")] * 5 + [_request("y", "b")] * 3 + [_request("x", "c")] * 2 + [_request(None, None)]
    found = {(e.trace_tenant, e.trace_adapter): e for e in assign_targets(requests, _TARGETS)}
    assert found["x", "a"].requests == 5
    assert (found["x", "a"].target.tenant, found["x", "a"].target.model) == ("acme", "base")
    assert (found["x", "c"].target.tenant, found["x", "c"].target.model) == ("acme", "pirate")
    assert found["y", "b"].target.tenant == "globex"
    assert found[None, None].target.tenant == "acme"


_names = st.none() | st.sampled_from(["acme", "globex", "t1", "t2", "t3", "pirate", "poet"])


@given(st.lists(st.builds(_request, _names, _names), min_size=1, max_size=40), st.randoms())
def test_assignment_is_total_and_ignores_order(requests: list[TraceRequest], shuffler: object) -> None:
    assignments = assign_targets(requests, _TARGETS)
    assert sum(entry.requests for entry in assignments) == len(requests)
    assert len({(e.trace_tenant, e.trace_adapter) for e in assignments}) == len(assignments)
    tenants: dict[str | None, str] = {}
    for entry in assignments:
        assert tenants.setdefault(entry.trace_tenant, entry.target.tenant) == entry.target.tenant
    shuffled = list(requests)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    assert assign_targets(shuffled, _TARGETS) == assignments
    assert len(plan_replay(requests, assignments, ReplayConfig())) == len(requests)


def test_no_target_is_an_error() -> None:
    with pytest.raises(BadConfig, match="no tenant"):
        assign_targets([_request("a", "b")], ())


def test_speed_duration_and_limits() -> None:
    requests = [
        _request("acme", "pirate", at_s, tokens) for at_s, tokens in ((0.0, None), (4.0, 500), (8.0, 0), (12.0, 9))
    ]
    config = ReplayConfig(
        speed=2.0, duration_s=6.0, default_prompt_tokens=11, default_output_tokens=12, max_prompt_tokens=100
    )
    plan = plan_replay(requests, assign_targets(requests, _TARGETS), config)
    assert [(p.at_s, p.prompt_tokens, p.output_tokens) for p in plan] == [(0.0, 11, 12), (2.0, 100, 500), (4.0, 1, 1)]
    assert len(plan_replay(requests, assign_targets(requests, _TARGETS), ReplayConfig(max_requests=2))) == 2


def test_settings_are_checked() -> None:
    with pytest.raises(BadConfig, match="speed"):
        ReplayConfig(speed=0)
    with pytest.raises(BadConfig, match="timeout_s"):
        RequestConfig(timeout_s=0)


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    content = {"http": "http://x", "tenants": [{"name": "a", "key": "k", "models": ["m", "n"]}], "later": 1}
    path.write_text(json.dumps(content))
    assert targets_of(read_key_file(path)) == (
        Target(tenant="a", model="m", key="k"),
        Target(tenant="a", model="n", key="k"),
    )
    with pytest.raises(NotFound, match="nosuch"):
        read_key_file(tmp_path / "nosuch")
    with pytest.raises(BadConfig, match=str(tmp_path)):
        read_key_file(tmp_path)


def test_word_prompts_differ_and_repeat() -> None:
    prompts = WordPrompts(seed=1)
    assert len(prompts.make(0, 50).split(" ")) == 50
    assert prompts.make(0, 50) == WordPrompts(seed=1).make(0, 50)
    assert len({prompts.make(index, 20) for index in range(100)}) == 100


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64, 301])
def test_tokenizer_prompts_are_exact(tmp_path: Path, num_tokens: int) -> None:
    prompts = TokenizerPrompts(build_tiny_tokenizer(tmp_path / "tokenizer"), seed=1)
    for index in range(5):
        assert prompts.count(prompts.make(index, num_tokens)) == num_tokens


def test_bad_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=str(tmp_path)):
        TokenizerPrompts(tmp_path, seed=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadConfig, match=r"tokenizer\.json"):
        TokenizerPrompts(tmp_path, seed=0)
