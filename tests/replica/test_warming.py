"""Adapters that the plan puts on a replica: resident before anybody asks for them, as far as there is room."""

from collections.abc import Iterator

import pytest
from loraplex.core.errors import NotFound
from loraplex.core.ids import Digest
from loraplex.engine import EngineConfig
from loraplex.testing.fake_executor import PAGE_BYTES, FakeExecutor, fake_manifest

from tests.replica.harness import Harness, make

A, B, C = (Digest(letter * 64) for letter in "abc")


@pytest.fixture
def harness() -> Iterator[Harness]:
    executor = FakeExecutor(num_pages=64, step_s=0.001)
    pages = executor.adapter_pages(fake_manifest(A))
    harness = Harness(executor, EngineConfig(max_running=8, max_waiting=4, max_adapter_bytes=2 * pages * PAGE_BYTES))
    harness.loop.open_session(1)
    yield harness
    harness.loop.stop()
    harness.loop.join()


def resident(harness: Harness) -> set[str]:
    """As the gateways have heard."""
    reports = [f.load.resident_adapters for f in harness.frames[1] if f.load and f.load.resident_adapters is not None]
    return set(reports[-1])


def wait_resident(harness: Harness, *digests: str) -> None:
    with harness.arrived:
        assert harness.arrived.wait_for(lambda: resident(harness) == set(digests), 5), resident(harness)


def test_a_planned_adapter_is_resident_before_its_first_request(harness: Harness) -> None:
    harness.loop.warm((A, B)).result(5)
    wait_resident(harness, A, B)
    harness.loop.submit(1, (make("one", adapter=A),))
    harness.wait_end(1, "one")
    loads = harness.frames[1][-1].load
    assert loads is not None
    assert (loads.adapter_loads, loads.adapter_prefetches, loads.adapter_hits) == (0, 2, 1)


def test_what_is_resident_and_wanted_stays(harness: Harness) -> None:
    harness.loop.warm((B,)).result(5)
    harness.loop.warm((A, C, B)).result(5)
    with harness.arrived:
        assert harness.arrived.wait_for(lambda: len(resident(harness)) == 2, 5)
    assert B in resident(harness)


def test_a_new_set_takes_the_room_of_the_old_one(harness: Harness) -> None:
    harness.loop.warm((A, B)).result(5)
    harness.loop.warm((C,)).result(5)
    with harness.arrived:
        assert harness.arrived.wait_for(lambda: C in resident(harness), 5)


def test_an_adapter_in_use_keeps_its_room(harness: Harness) -> None:
    harness.loop.submit(1, (make("long", adapter=A, max_tokens=200),))
    with harness.arrived:
        assert harness.arrived.wait_for(lambda: bool(harness.tokens(1, "long")), 5)
    harness.loop.warm((B, C)).result(5)
    with harness.arrived:
        assert harness.arrived.wait_for(lambda: len(resident(harness)) == 2, 5)
    assert A in resident(harness)
    harness.wait_end(1, "long")


def test_one_that_cannot_be_read_holds_up_nobody(harness: Harness) -> None:
    harness.source.errors[A] = NotFound("deleted meanwhile")
    harness.loop.warm((A, B)).result(5)
    wait_resident(harness, B)


def test_a_later_call_takes_the_place_of_an_earlier_one(harness: Harness) -> None:
    first, second = harness.loop.warm((A, B, C)), harness.loop.warm(())
    first.result(5)
    second.result(5)


def test_nobody_waits_for_a_replica_that_ends(harness: Harness) -> None:
    harness.loop.stop()
    harness.loop.join()
    harness.loop.warm((A,)).result(5)
