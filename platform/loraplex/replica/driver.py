"""Carries out what the engine instructs on an executor, keeps as many steps in flight as it takes, and turns failures
into events.

Knows no threads, no network and no clock but the one it is given. Called by ``engine_loop`` and by ``loraplex.bench``.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from loraplex.core.clock import Clock
from loraplex.core.errors import ExecutorLost, LoraplexError
from loraplex.core.ids import Digest
from loraplex.core.request import RequestOutput
from loraplex.core.step import Executor
from loraplex.engine import Engine, Instructions
from loraplex.replica.failures import request_failure

STEP_FAILED = "the model failed while it computed this request"
LOAD_FAILED = "the adapter could not be loaded onto the accelerator"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    progressed: bool
    """False: nothing could run; only another event can change that."""
    outputs: tuple[RequestOutput, ...] = ()


class StepDriver:
    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        *,
        clock: Clock,
        unstage: Callable[[Digest], None],
        hear: Callable[[], None] = lambda: None,
    ) -> None:
        """``unstage`` drops an adapter from host memory. ``hear`` tells the engine what has come since ``step`` was
        called; to start a step may have taken long, where others share the device."""
        self._engine = engine
        self._executor = executor
        self._clock = clock
        self._unstage = unstage
        self._hear = hear
        self.num_steps = 0
        self.busy_s = 0.0
        """Time that the executor has spent in steps that did not raise."""

    def step(self) -> StepOutcome:
        """Submits steps until the executor holds as many as it takes or nothing can be planned, then collects the
        oldest. An executor's exception ends the requests that caused it, not the caller; ExecutorLost alone is raised:
        nothing can run any more."""
        while self._engine.num_in_flight < self._executor.max_in_flight:
            instructions = self._engine.schedule(self._clock.monotonic_s())
            failed = self._prepare(instructions)
            if failed is not None:
                return failed
            if instructions.plan is None:
                break
            try:
                self._executor.submit(instructions.plan)
            except ExecutorLost:
                raise
            except Exception as error:
                _log.exception("step %d could not be started", instructions.plan.step_id)
                failure = request_failure(error, STEP_FAILED)
                return StepOutcome(progressed=True, outputs=self._engine.submit_failed(failure))
            self._hear()
        if self._engine.num_in_flight == 0:
            return StepOutcome(progressed=False)
        try:
            result = self._executor.collect()
        except ExecutorLost:
            raise
        except Exception as error:
            _log.exception("the oldest step in flight failed")
            failure = request_failure(error, STEP_FAILED)
            return StepOutcome(progressed=True, outputs=self._engine.step_failed(failure))
        self.num_steps += 1
        self.busy_s += result.duration_s
        return StepOutcome(progressed=True, outputs=self._engine.complete(result, self._clock.monotonic_s()))

    def _prepare(self, instructions: Instructions) -> StepOutcome | None:
        """Carries out all but the plan; an outcome when a load failed and the plan is therefore withdrawn."""
        for digest in instructions.drops:
            self._executor.drop_adapter(digest)
        for digest in instructions.unstages:
            self._unstage(digest)
        failures: dict[Digest, LoraplexError] = {}
        for load in instructions.loads:
            try:
                self._executor.load_adapter(load.digest, load.pages)
            except ExecutorLost:
                raise
            except Exception as error:
                _log.exception("loading adapter %s failed", load.digest)
                failures[load.digest] = request_failure(error, LOAD_FAILED)
        if not failures:
            return None
        outputs = self._engine.loads_failed(failures)
        # At once: a request that comes next finds the adapter missing and has it staged again.
        for digest in failures:
            self._unstage(digest)
        return StepOutcome(progressed=True, outputs=outputs)
