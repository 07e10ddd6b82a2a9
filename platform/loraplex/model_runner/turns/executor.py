"""An executor that shares its GPUs with those of other processes, and runs its steps when it is its turn.

Decides nothing about requests. Wraps any ``core.step.Executor``, of one rank or of a group: the engine's process drives
all ranks, so it alone stands in the queue. Loading adapters and staging need no turn. Made by whoever starts several
replicas on one group; driven by the engine loop.
"""

from contextlib import suppress
from typing import Protocol

from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import ExecutorLost
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import ArenaSpec, Executor, StepPlan, StepResult
from loraplex.model_runner.turns.queue import TurnQueue

PATIENCE_S = 60.0
"""For the turn, by default: longer than the ranks of another base may hang before their own watch ends them."""


class PreparingExecutor(Executor, Protocol):
    def prepare(self, plan: StepPlan) -> None:
        """Does what can be done of the next step before it may run; raises as ``submit`` does. ``submit`` of this plan
        is the next call, ``check`` apart, and does the rest, or all of it when this has raised."""


class TurnExecutor:
    """Implements ``core.step.Executor``.

    It has the turn while steps of its own are in flight. As long as nobody waits it keeps as many of them in flight as
    the executor takes, and so keeps the turn. When somebody waits it takes no more than a step for each stage, and
    hands over with the last one's result. One that had to wait for its turn takes it for granted that whoever had it
    before wants it back, until its first step is done: that one is about to ask. So a turn is as many steps as may be
    in flight, at most, and an idle replica has none.
    """

    def __init__(self, executor: PreparingExecutor, queue: TurnQueue, *, patience_s: float = PATIENCE_S) -> None:
        """Owns both from now on: ``close`` closes them. ``patience_s``: how long a turn is waited for before the
        executor counts as lost."""
        self._executor = executor
        self._queue = queue
        self._patience_s = patience_s
        self._num_in_flight = 0
        self._num_in_turn = 0
        """Steps that were submitted in this turn."""
        self._expects_others = False

    @property
    def model(self) -> ModelSpec:
        return self._executor.model

    @property
    def arena(self) -> ArenaSpec:
        return self._executor.arena

    @property
    def max_in_flight(self) -> int:
        """No more than there are, when the turn is another's next."""
        is_over = self._num_in_turn >= self.num_stages and (self._expects_others or self._queue.is_wanted)
        return self._num_in_flight if is_over else self._executor.max_in_flight

    @property
    def num_stages(self) -> int:
        return self._executor.num_stages

    def check(self) -> None:
        self._executor.check()

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        return self._executor.adapter_pages(manifest)

    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        self._executor.stage_adapter(manifest, path)

    def unstage_adapter(self, digest: Digest) -> None:
        self._executor.unstage_adapter(digest)

    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
        self._executor.load_adapter(digest, pages)

    def drop_adapter(self, digest: Digest) -> None:
        self._executor.drop_adapter(digest)

    def submit(self, plan: StepPlan) -> None:
        """Waits for the turn, and prepares the step meanwhile. ExecutorLost also when it does not come."""

        def prepare() -> None:
            # What fails here fails in its turn as well.
            with suppress(Exception):
                self._executor.prepare(plan)

        if not self._queue.has_turn:
            try:
                self._expects_others = self._queue.take(
                    first=prepare, while_waiting=self._executor.check, timeout_s=self._patience_s
                )
            except TimeoutError:
                raise ExecutorLost(
                    f"another base of the group has kept its GPUs for {self._patience_s:.0f} s"
                ) from None
        try:
            self._executor.submit(plan)
        except BaseException:
            self._end_turn_if_idle()
            raise
        self._num_in_flight += 1
        self._num_in_turn += 1

    def collect(self) -> StepResult:
        try:
            result = self._executor.collect()
        except BaseException:
            # All steps are void.
            self._num_in_flight = 0
            self._end_turn_if_idle()
            raise
        self._num_in_flight -= 1
        self._expects_others = False
        self._end_turn_if_idle()
        return result

    def close(self) -> None:
        """Idempotent."""
        try:
            self._executor.close()
        finally:
            self._num_in_turn = 0
            self._queue.close()

    def _end_turn_if_idle(self) -> None:
        if self._num_in_flight == 0 and self._queue.has_turn:
            self._num_in_turn = 0
            self._queue.hand_over()
