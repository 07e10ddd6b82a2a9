"""Replicas of one group, in processes of their own: whose turn it is, and what becomes of it when one dies or hangs."""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from loraplex.core.errors import BadConfig, Conflict, ExecutorLost
from loraplex.core.step import StepPlan, StepResult
from loraplex.engine import EngineConfig
from loraplex.model_runner.turns.executor import TurnExecutor
from loraplex.model_runner.turns.queue import TurnQueue
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens

from tests.model_runner.turn_processes import Member, members, wait_until
from tests.replica.harness import Harness, make

pytestmark = pytest.mark.alone


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "turns")


def test_nobody_is_overtaken(path: str) -> None:
    with members(path, 4, num_places=3) as (first, second, third, witness):
        first.ask()
        assert first.gets_it()
        assert not first.is_wanted
        second.ask()
        wait_until(lambda: first.is_wanted)
        third.ask()
        wait_until(lambda: witness.sees(2))
        for has, comes in pairwise([first, second, third, first, second]):
            has.hand_over()
            assert comes.gets_it()
            wait_until(lambda: not witness.sees(2))
            has.ask()
            wait_until(lambda: witness.sees(2))
        assert not first.gets_it(within_s=0.2), "it is the second one's turn"


def test_who_asks_again_at_once_stands_behind_who_waits(path: str) -> None:
    with members(path, 2) as (first, second):
        first.ask()
        assert first.gets_it()
        second.ask()
        for has, comes in pairwise([first, second] * 3):
            wait_until(partial(getattr, has, "is_wanted"))
            has.hand_over(and_ask=True)
            assert comes.gets_it()


def test_the_turn_of_a_process_that_is_killed_goes_to_the_next(path: str) -> None:
    with members(path, 2) as (first, second):
        first.ask()
        assert first.gets_it()
        second.ask()
        wait_until(lambda: first.is_wanted)
        first.kill()
        assert second.gets_it(within_s=1.0)


def test_one_that_is_killed_while_it_waits_leaves_the_queue(path: str) -> None:
    with members(path, 4, num_places=3) as (first, second, third, witness):
        first.ask()
        assert first.gets_it()
        second.ask()
        wait_until(lambda: first.is_wanted)
        third.ask()
        wait_until(lambda: witness.sees(2))
        second.kill()
        wait_until(lambda: not witness.sees(2))
        assert first.is_wanted
        first.hand_over()
        assert third.gets_it(within_s=1.0)


@pytest.fixture
def witness(path: str) -> Iterator[Member]:
    """A process that only looks."""
    with members(path, 1, num_places=2) as (member,):
        yield member


@pytest.fixture
def other(path: str) -> Iterator[Member]:
    """Of the same group; it has the turn."""
    with members(path, 1, num_places=2) as (member,):
        member.ask()
        assert member.gets_it()
        yield member


def start(path: str, executor: FakeExecutor, *, patience_s: float = 30.0) -> Harness:
    """A replica of a group of two."""
    driven = TurnExecutor(executor, TurnQueue(path, num_places=2), patience_s=patience_s)
    harness = Harness(executor, EngineConfig(max_running=4), driven=driven)
    harness.loop.open_session(1)
    return harness


def serve(path: str, executor: FakeExecutor, *names: str) -> list[tuple[int, ...]]:
    """What a replica says to each."""
    harness = start(path, executor)
    harness.loop.submit(1, tuple(map(make, names)))
    harness.wait_end(1, *names)
    harness.loop.stop()
    harness.loop.join()
    return [harness.tokens(1, name) for name in names]


def test_a_replica_alone_keeps_its_steps_in_flight_and_has_no_turn_when_idle(path: str, witness: Member) -> None:
    recorded = Recorded(max_in_flight=2, step_s=0.002)
    harness = start(path, recorded)
    harness.loop.submit(1, (make("a", max_tokens=200),))
    wait_until(lambda: witness.sees(0))
    harness.wait_end(1, "a")
    wait_until(lambda: not witness.sees(0))
    assert harness.tokens(1, "a") == expected_tokens(make("a"), 200)
    assert Counter(recorded.in_flight).most_common(1)[0][0] == 2
    harness.loop.stop()
    harness.loop.join()


@pytest.mark.parametrize(("max_in_flight", "num_stages"), [(2, 1), (3, 2)])
def test_when_somebody_waits_a_turn_is_a_step_of_each_stage(path: str, max_in_flight: int, num_stages: int) -> None:
    with members(path, 1, num_places=2) as (other,):
        recorded = Recorded(max_in_flight=max_in_flight, num_stages=num_stages, step_s=0.02)
        harness = start(path, recorded)
        names = [f"r{index}" for index in range(num_stages)]
        harness.loop.submit(1, tuple(make(name, max_tokens=40) for name in names))
        other.ask()
        assert other.gets_it(within_s=5.0)
        turns = []
        for _ in range(8):
            # Whoever comes back at once finds it in the queue.
            wait_until(lambda: other.is_wanted)
            submitted = len(recorded.in_flight)
            other.hand_over(and_ask=True)
            assert other.gets_it(within_s=5.0)
            assert recorded.num_in_flight == 0, "it hands over what it has finished"
            turns.append(len(recorded.in_flight) - submitted)
        # Fewer as long as all are in one step.
        assert Counter(turns).most_common(1)[0][0] == num_stages, (turns, recorded.in_flight)
        assert max(turns) <= max_in_flight
        other.hand_over()
        harness.wait_end(1, *names)
        harness.loop.stop()
        harness.loop.join()


class Recorded(FakeExecutor):
    """Notes how many steps were in flight with each that was submitted."""

    def __init__(self, **more: object) -> None:
        super().__init__(num_pages=256, **more)  # type: ignore[arg-type]
        self.in_flight: list[int] = []
        self.num_in_flight = 0

    def submit(self, plan: object) -> None:
        super().submit(plan)  # type: ignore[arg-type]
        self.num_in_flight += 1
        self.in_flight.append(self.num_in_flight)

    def collect(self) -> StepResult:
        result = super().collect()
        self.num_in_flight -= 1
        return result


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_prepared_while_it_waits_for_its_turn(path: str, other: Member, fails: bool) -> None:
    """Once, when others know that it waits; what fails there does not fail the step."""
    noted: list[tuple[str, int]] = []

    class Noted(FakeExecutor):
        def prepare(self, plan: StepPlan) -> None:
            noted.append(("prepare", plan.step_id))
            if fails:
                raise Conflict("not now")

        def submit(self, plan: StepPlan) -> None:
            noted.append(("submit", plan.step_id))
            super().submit(plan)

    harness = start(path, Noted(num_pages=256, step_s=0.01))
    harness.loop.submit(1, (make("a", max_tokens=3),))
    wait_until(lambda: len(noted) == 1)
    assert other.is_wanted
    assert noted == [("prepare", 1)]
    other.hand_over()
    harness.wait_end(1, "a")
    assert harness.tokens(1, "a") == expected_tokens(make("a"), 3)
    assert noted == [("prepare", 1), *(("submit", step) for step in range(1, len(noted)))]
    harness.loop.stop()
    harness.loop.join()


@pytest.mark.parametrize("hangs", [False, True])
def test_a_turn_that_does_not_come_loses_the_executor(path: str, other: Member, witness: Member, hangs: bool) -> None:
    if hangs:
        other.stop()
    harness = start(path, FakeExecutor(), patience_s=1.0)
    harness.loop.submit(1, (make("a"),))
    assert harness.ended.wait(10)
    with pytest.raises(ExecutorLost, match="another base of the group has kept its GPUs for 1 s"):
        harness.loop.join()
    other.kill()
    wait_until(lambda: not witness.sees(0))


def test_who_waits_notices_that_its_own_ranks_are_gone(path: str, other: Member) -> None:
    class Lost(FakeExecutor):
        def check(self) -> None:
            raise ExecutorLost("rank 1 ended")

    harness = start(path, Lost())
    harness.loop.submit(1, (make("a"),))
    with pytest.raises(ExecutorLost, match="rank 1 ended"):
        harness.loop.join()


@pytest.mark.parametrize("raises_in", ["submit", "collect"])
def test_a_step_that_fails_ends_the_turn(path: str, raises_in: str, witness: Member) -> None:
    poisoned = FakeExecutor(num_pages=256, poisoned=["a" * 64], raises_in=raises_in, max_in_flight=2)  # type: ignore[arg-type]
    harness = start(path, poisoned)
    harness.loop.submit(1, (make("bad", adapter="a" * 64),))
    harness.wait_end(1, "bad")
    wait_until(lambda: not witness.sees(0))
    harness.loop.submit(1, (make("good"),))
    harness.wait_end(1, "good")
    assert harness.tokens(1, "good") == expected_tokens(make("good"), 20)
    harness.loop.stop()
    harness.loop.join()


def test_steps_of_two_replicas_never_overlap_and_both_get_on(path: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both_there = context.Barrier(2)
    files = [str(tmp_path / f"steps-{index}") for index in range(2)]
    processes = [context.Process(target=serve_and_note, args=(path, file, both_there)) for file in files]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    steps = sorted(
        (float(began), float(ended), index)
        for index, file in enumerate(files)
        for began, ended in (line.split() for line in Path(file).read_text().splitlines())
    )
    assert all(one[1] <= after[0] for one, after in pairwise(steps))
    both = [index for began, _, index in steps if began > max(min(s for s, _, i in steps if i == k) for k in (0, 1))]
    ends = min(max(place for place, index in enumerate(both) if index == k) for k in (0, 1))
    assert ends > 10
    changes = sum(one != after for one, after in pairwise(both[:ends]))
    assert changes > 0.7 * ends, "one step each while both have work, but where one comes late to the queue"


def serve_and_note(path: str, file: str, both_there: Barrier) -> None:
    """In a process of its own."""
    noted: list[tuple[float, float]] = []

    class Noted(FakeExecutor):
        def submit(self, plan: object) -> None:
            self.began_s = time.monotonic()
            super().submit(plan)  # type: ignore[arg-type]

        def collect(self) -> StepResult:
            result = super().collect()
            noted.append((self.began_s, time.monotonic()))
            return result

    both_there.wait(30)
    said = serve(path, Noted(num_pages=256, step_s=0.02), "a", "b")
    assert said == [expected_tokens(make("a"), 20), expected_tokens(make("b"), 20)]
    Path(file).write_text("".join(f"{began} {ended}\n" for began, ended in noted))


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot take turns by it"):
        TurnQueue(str(tmp_path / "missing" / "turns"), num_places=2)
    target = tmp_path / "target"
    target.touch()
    os.symlink(target, tmp_path / "link")
    with pytest.raises(BadConfig, match="cannot take turns by it"):
        TurnQueue(str(tmp_path / "link"), num_places=2)
