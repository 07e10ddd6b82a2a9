"""Adapters come, stay and go: who waits for them, and what makes room."""

import pytest
from loraplex.core.errors import (
    ContextTooLong,
)
from loraplex.core.ids import Digest
from loraplex.core.request import FinishReason
from loraplex.testing.fake_executor import PAGE_BYTES

from tests.engine.harness import A, B, Harness, make


def test_a_cold_adapter_costs_a_price_but_waits_a_bounded_time() -> None:
    harness = Harness(max_running=2, overdue_s=12.0, adapter_token_price=1e6, prefix_cache=False)
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
    assert sum(harness.loads, ()) == (A, B)
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
    harness = Harness(max_host_bytes=3 * PAGE_BYTES, num_pages=16)
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
