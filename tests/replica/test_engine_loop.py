"""The engine's thread, without a network."""

import time
from collections.abc import Iterable, Iterator

import pytest
from loraplex.core.errors import BadAdapter, Conflict, ContextTooLong, LoraplexError, NotFound, StorageFull, Unavailable
from loraplex.core.ids import Digest, RequestId
from loraplex.core.request import FinishReason
from loraplex.core.step import Row, StepPlan, StepResult
from loraplex.engine import EngineConfig
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens

from tests.replica.harness import A, Harness, make


@pytest.fixture(params=[1, 2], ids=["one-step-in-flight", "two-steps-in-flight"])
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    executor = FakeExecutor(num_pages=256, step_s=0.001, max_in_flight=request.param)
    harness = Harness(executor, EngineConfig(max_running=8, max_waiting=4))
    yield harness
    harness.loop.stop()
    harness.loop.join()
    assert harness.executor.closed
    assert harness.ended.is_set()


def test_one_frame_a_step_carries_all_tokens_of_a_gateway(harness: Harness) -> None:
    harness.loop.open_session(1)
    requests = tuple(make(f"r{i}", max_tokens=30, adapter=A if i % 2 else None) for i in range(6))
    harness.loop.submit(1, requests)
    harness.wait_end(1, *(f"r{i}" for i in range(6)))
    for request in requests:
        assert harness.tokens(1, request.request_id) == expected_tokens(request, 30)
    steps = [frame.load.steps for frame in harness.frames[1] if frame.outputs and frame.load is not None]
    assert len(steps) == len(set(steps)), "a step was told in two frames"
    assert len(steps) <= 40


def test_the_first_frame_introduces_the_replica_and_credits_are_shared(harness: Harness) -> None:
    for session in (1, 2, 3):
        harness.loop.open_session(session)
    deadline_s = time.monotonic() + 5
    while not all(
        frames and frames[-1].load and frames[-1].load.credits == 4
        for frames in map(harness.frames.__getitem__, (1, 2, 3))
    ):
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    for session in (1, 2, 3):
        first = harness.frames[session][0]
        assert first.replica == harness.loop.info
        assert first.load is not None
        assert first.load.resident_adapters == ()
        assert all(frame.replica is None for frame in harness.frames[session][1:])


def test_reports_tell_the_work_that_was_done(harness: Harness) -> None:
    harness.loop.open_session(1)
    requests = (make("x", max_tokens=5), make("y", max_tokens=7))
    harness.loop.submit(1, requests)
    harness.wait_end(1, "x", "y")
    info, report = harness.frames[1][0].replica, harness.frames[1][-1].load
    assert info is not None
    assert (info.max_running, info.max_step_tokens) == (8, EngineConfig().max_step_tokens)
    assert report is not None
    assert report.prefilled_tokens == sum(len(request.prompt_token_ids) for request in requests)
    assert report.steps * 0.001 <= report.busy_s < 10


def test_gateways_get_their_own_outputs_and_hear_of_new_adapters(harness: Harness) -> None:
    harness.loop.open_session(1)
    harness.loop.open_session(2)
    with harness.arrived:
        assert harness.arrived.wait_for(lambda: bool(harness.frames[2]), 5)
    harness.loop.submit(1, (make("one", adapter=A, max_tokens=200),))
    harness.wait_end(1, "one")
    time.sleep(0.05)
    assert all(not frame.outputs for frame in harness.frames[2])
    resident = [f.load.resident_adapters for f in harness.frames[2] if f.load and f.load.resident_adapters is not None]
    assert resident == [(), (A,)]
    assert len(harness.frames[2]) < len(harness.frames[1])


def test_a_refused_request_does_not_disturb(harness: Harness) -> None:
    harness.loop.open_session(1)
    harness.loop.submit(1, (make("big", prompt=2000), make("ok"), make("dup", max_tokens=400)))
    harness.loop.submit(1, (make("empty", prompt=0),))
    reasons = harness.wait_end(1, "big", "ok", "empty")
    assert reasons == {"big": FinishReason.ERROR, "ok": FinishReason.LENGTH, "empty": FinishReason.ERROR}
    harness.loop.abort(2, (RequestId("dup"),))
    harness.loop.abort(1, (RequestId("dup"), RequestId("unknown")))
    assert harness.wait_end(1, "dup") == {"dup": FinishReason.ABORT}


def test_what_ends_a_request_is_told_by_its_kind(harness: Harness) -> None:
    harness.executor.unstageable = frozenset({Digest("e" * 64)})
    harness.executor.unloadable = frozenset({Digest("f" * 64)})
    harness.source.errors = {
        "a" * 64: NotFound("deleted"),
        "b" * 64: Unavailable("the controller is away"),
        "c" * 64: StorageFull("no space left"),
        "d" * 64: OSError("/secret"),
        "g" * 64: Conflict("a bug of ours at /secret"),
    }
    harness.loop.open_session(1)
    harness.loop.submit(1, tuple(make(letter, adapter=letter * 64) for letter in "abcdefg"))
    harness.loop.submit(1, (make("big", prompt=600),))
    harness.wait_end(1, *"abcdefg", "big")
    outputs = [o for f in harness.frames[1] for o in f.outputs if o.finish_reason is FinishReason.ERROR]
    assert {output.request_id: output.error_code for output in outputs} == {
        "a": NotFound.code,
        "b": Unavailable.code,
        "c": StorageFull.code,
        "d": "generation_failed",
        "e": BadAdapter.code,
        "f": "generation_failed",
        "big": ContextTooLong.code,
        "g": "generation_failed",
    }
    assert not [output.error for output in outputs if "/secret" in str(output.error)]


def test_reports_count_the_requests_of_their_session(harness: Harness) -> None:
    harness.loop.open_session(1)
    harness.loop.open_session(2)
    harness.loop.submit(1, (make("r0"), make("big", prompt=2000), make("r1", max_tokens=400)))
    harness.wait_end(1, "r0", "big")
    harness.loop.submit(1, (make("r2"),))
    harness.loop.abort(1, (RequestId("r1"),))
    harness.wait_end(1, "r1", "r2")
    counts = {s: [f.load.num_received for f in frames if f.load is not None] for s, frames in harness.frames.items()}
    assert counts[1][-1] == 4
    assert set(counts[2]) == {0}
    harness.loop.close_session(1)
    harness.loop.open_session(3)
    with harness.arrived:
        assert harness.arrived.wait_for(lambda: bool(harness.frames[3]), 5)
    assert harness.frames[3][0].load is not None
    assert harness.frames[3][0].load.num_received == 0


def test_a_closed_session_aborts_its_requests_and_its_ids_are_free(harness: Harness) -> None:
    harness.loop.open_session(1)
    harness.loop.submit(1, (make("r", max_tokens=400),))
    harness.loop.close_session(1)
    harness.loop.close_session(1)
    harness.loop.submit(1, (make("late"),))
    harness.loop.open_session(2)
    harness.loop.submit(2, (make("r"),))
    assert harness.wait_end(2, "r") == {"r": FinishReason.LENGTH}
    assert harness.tokens(2, "r") == expected_tokens(make("r"), 20)
    assert harness.loop.num_unfinished == 0


def test_an_idle_loop_sleeps(harness: Harness) -> None:
    harness.loop.open_session(1)
    harness.loop.submit(1, (make("r"),))
    harness.wait_end(1, "r")
    time.sleep(0.05)
    count, cpu_s = len(harness.frames[1]), time.process_time()
    time.sleep(0.3)
    assert len(harness.frames[1]) == count
    assert time.process_time() - cpu_s < 0.1


def test_an_adapter_that_could_not_be_loaded_is_staged_again_for_the_next_request() -> None:
    class FailsOnce(FakeExecutor):
        """The next request comes while the load fails."""

        failed = False

        def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
            if not self.failed:
                self.failed = True
                world.loop.submit(1, (make("second", adapter=A),))
                raise RuntimeError("the copy failed")
            super().load_adapter(digest, pages)

    world = Harness(FailsOnce())
    world.loop.open_session(1)
    world.loop.submit(1, (make("first", adapter=A),))
    try:
        reasons = world.wait_end(1, "first", "second")
    finally:
        world.loop.stop()
        world.loop.join()
    assert reasons == {"first": FinishReason.ERROR, "second": FinishReason.LENGTH}
    assert world.tokens(1, "second") == expected_tokens(make("second", adapter=A), 20)


@pytest.mark.parametrize("tenants", ["a", "ab"])
@pytest.mark.parametrize(("call", "max_in_flight"), [("submit", 1), ("submit", 2), ("collect", 2)])
def test_a_replica_whose_device_is_broken_ends_before_it_has_failed_all_that_wait(
    tenants: str, call: str, max_in_flight: int
) -> None:
    class Broken(FakeExecutor):
        def _raise_if_failing(self, current: str, rows: Iterable[Row]) -> None:
            if current == call:
                raise RuntimeError("illegal memory access")

    running = Harness(Broken(max_in_flight=max_in_flight), EngineConfig(max_running=16))
    running.loop.open_session(1)
    running.loop.submit(1, tuple(make(f"r{i}", tenant=tenants[i % len(tenants)], adapter=A) for i in range(16)))
    assert running.ended.wait(10)
    with pytest.raises(LoraplexError, match="fails whatever"):
        running.loop.join()
    ended = [o for f in running.frames[1] for o in f.outputs if o.finish_reason is not None]
    assert len(ended) <= 8, "the others go on at another replica"


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_broken_adapters_alone_do_not_end_a_replica(max_in_flight: int) -> None:
    adapters = [letter * 64 for letter in "abcdef"]
    executor = FakeExecutor(num_pages=256, poisoned=adapters, max_in_flight=max_in_flight)
    running = Harness(executor, EngineConfig(max_running=4))
    running.loop.open_session(1)
    requests = tuple(make(f"r{i}", tenant="xyz"[i % 3], adapter=adapters[i % 6]) for i in range(24))
    running.loop.submit(1, requests)
    reasons = running.wait_end(1, *(request.request_id for request in requests))
    assert set(reasons.values()) == {FinishReason.ERROR}
    running.loop.submit(1, (make("sound"),))
    assert running.wait_end(1, "sound") == {"sound": FinishReason.LENGTH}
    assert {o.request_id for f in running.frames[1] for o in f.outputs} == {*reasons, "sound"}
    running.loop.stop()
    running.loop.join()
    assert not running.executor.violations


def test_a_bug_in_the_loop_ends_it_and_is_told() -> None:
    harness = Harness(FakeExecutor())
    harness.loop._post(lambda: 1 // 0)  # type: ignore[arg-type]
    assert harness.ended.wait(5)
    with pytest.raises(ZeroDivisionError):
        harness.loop.join()
    assert harness.executor.closed


def test_what_comes_while_a_step_is_started_is_in_the_next_one() -> None:
    class Coming(FakeExecutor):
        """Another request comes while the first step waits for its turn."""

        def submit(self, plan: StepPlan) -> None:
            if not calls:
                harness.loop.submit(1, (make("b", prompt=3),))
            super().submit(plan)
            calls.append([len(row.token_ids) for row in plan.rows])

        def collect(self) -> StepResult:
            calls.append("collect")
            return super().collect()

    calls: list[object] = []
    harness = Harness(Coming(num_pages=64, max_in_flight=2, num_stages=2), EngineConfig(max_running=4))
    harness.loop.open_session(1)
    harness.loop.submit(1, (make("a"),))
    harness.wait_end(1, "a", "b")
    harness.loop.stop()
    harness.loop.join()
    assert calls[:3] == [[6], [3], "collect"]
    assert harness.tokens(1, "b") == expected_tokens(make("b", prompt=3), 20)
