"""Whose turn it is: online before offline, tenants by their weights, and who gives way when pages are short."""

import pytest

from tests.engine.harness import A, Harness, make


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
