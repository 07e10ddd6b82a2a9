"""The engine's thread: takes requests from gateways' sessions, runs steps, and hands each session one frame per step.

Joins Engine, executor and staging. Knows sessions as opaque numbers and no network; called by ``server``, whose
methods may be called from any thread. When idle it sleeps until the next event.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from loraplex.core.clock import Clock, SystemClock
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import Digest, ReplicaId, RequestId
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput
from loraplex.core.step import Executor
from loraplex.core.wire import LoadReport, ReplicaFrame, ReplicaInfo
from loraplex.engine import Engine, EngineConfig
from loraplex.replica.config import ReplicaConfig
from loraplex.replica.driver import StepDriver
from loraplex.replica.failures import request_failure
from loraplex.replica.frames import merge_outputs
from loraplex.replica.request_spans import RequestSpans
from loraplex.replica.staging import AdapterStager, ArtifactSource
from loraplex.replica.warming import Warming
from loraplex.telemetry.tracing import Tracing

_CHECK_S = 1.0
"""While nothing runs, the executor is asked this often whether it is well."""

_log = logging.getLogger(__name__)

Deliver = Callable[[dict[int, ReplicaFrame]], None]
"""Takes the frames of one step, by session; called on the engine's thread, must not block."""


@dataclass(slots=True)
class _Session:
    """What the loop keeps of one gateway's stream."""

    requests: set[RequestId] = field(default_factory=set)
    num_received: int = 0
    """Requests that came, refused ones too."""
    outputs: list[RequestOutput] = field(default_factory=list)
    residency_version: int = -1
    reported_serial: int = -1
    reported_s: float = float("-inf")


class EngineLoop:
    def __init__(
        self,
        *,
        replica_id: ReplicaId,
        executor: Executor,
        engine_config: EngineConfig,
        source: ArtifactSource,
        config: ReplicaConfig | None = None,
        clock: Clock | None = None,
        tracing: Tracing | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Owns the executor from now on: ``stop`` closes it. ``engine``: of this config and executor, by default made
        here. Raises BadConfig."""
        config = config or ReplicaConfig()
        self._clock = clock or SystemClock()
        self._executor = executor
        self._interval_s = config.load_report_interval_s
        self._engine = engine or Engine(
            engine_config, model=executor.model, arena=executor.arena, num_stages=executor.num_stages
        )
        self._stager = AdapterStager(
            executor,
            source,
            num_threads=config.staging_threads,
            on_staged=lambda digest, pages: self._post(partial(self._on_staged, digest, pages)),
            on_failed=lambda digest, error: self._post(partial(self._on_stage_failed, digest, error)),
        )
        self._driver = StepDriver(
            self._engine, executor, clock=self._clock, unstage=self._stager.unstage, hear=self._drain_inbox
        )
        self._deliver: Deliver | None = None
        self._on_end: Callable[[], None] | None = None
        self._sessions: dict[int, _Session] = {}
        self._session_of: dict[RequestId, int] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._warming = Warming(())
        self._serial = 0
        self._num_prompt_tokens = 0
        """Of all requests that the engine took, with those generated elsewhere."""
        self._draining = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.info = ReplicaInfo(
            replica_id=replica_id,
            base_model_id=executor.model.base_model_id,
            max_context_tokens=executor.model.max_context_tokens,
            num_pages=executor.arena.num_pages,
            page_size=executor.arena.page_size,
            max_running=engine_config.max_running,
            max_step_tokens=engine_config.max_step_tokens,
            heartbeat_s=config.heartbeat_s,
        )
        self._spans = RequestSpans(tracing or Tracing(), self.info, self._clock)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended; exact only between steps."""
        return len(self._session_of)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Blocks until the loop has ended. Raises what broke it: a bug, or an executor that fails every request."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends the loop after the step under way; unfinished requests are dropped. Idempotent."""
        self._stopping = True
        self._wake.set()

    def drain(self) -> None:
        """From now on no credits are given out; what has come still runs, then the loop ends."""
        self._post(self._on_drain)

    def connect(self, deliver: Deliver, *, on_end: Callable[[], None]) -> None:
        """Who takes the frames, and who hears on the engine's thread that the loop has ended. Before any session."""
        self._deliver = deliver
        self._on_end = on_end

    def open_session(self, session: int) -> None:
        """A gateway's stream began: it gets a first frame at once."""
        self._post(partial(self._on_open, session))

    def close_session(self, session: int) -> None:
        """The stream ended: all its requests are aborted. Idempotent."""
        self._post(partial(self._on_close, session))

    def submit(self, session: int, requests: tuple[EngineRequest, ...]) -> None:
        """Takes requests; one that the engine refuses is answered with FinishReason.ERROR."""
        self._post(partial(self._on_submit, session, requests))
        for request in requests:
            if request.adapter is not None:
                self._stager.request(request.adapter.digest)

    def abort(self, session: int, request_ids: tuple[RequestId, ...]) -> None:
        """Unknown ids, and those of other sessions, are ignored."""
        self._post(partial(self._on_abort, session, request_ids))

    def warm(self, digests: tuple[Digest, ...]) -> "Future[None]":
        """Makes these adapters resident, begun in this order, as far as there is room; done when each of them is, has
        failed, or finds no room. Takes the place of an earlier call, which is done then."""
        warming = Warming(digests)
        self._post(partial(self._on_warm, warming))
        if not self.alive:
            warming.end()
        return warming.done

    def _post(self, event: Callable[[], None]) -> None:
        self._inbox.append(event)
        self._wake.set()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            # A bug of ours or a broken device: other executor failures end in outputs. Better dead than wrong.
            _log.critical("the engine loop of %s broke", self.info.replica_id, exc_info=True)
            self._failure = error
        finally:
            if self._on_end is not None:
                self._on_end()
            self._stager.close()
            self._warming.end()
            self._executor.close()

    def _loop(self) -> None:
        progressed = False
        while not self._stopping:
            while not progressed and not self._wake.wait(_CHECK_S):
                self._executor.check()
            self._wake.clear()
            self._drain_inbox()
            for digest in self._engine.wanted_adapters():
                self._stager.request(digest)
            began_s = self._clock.wall_s() if self._spans.active else 0.0
            outcome = self._driver.step()
            progressed = outcome.progressed
            if self._spans.active:
                self._spans.step(self._engine, outcome.outputs, began_s=began_s)
            self._serial += 1
            self._collect(outcome.outputs)
            self._send_frames(idle=not progressed)
            if self._engine.executor_broken:
                # Routers resubmit what is left to other replicas; the controller starts a new one.
                raise LoraplexError("the executor fails whatever it is given")
            if self._draining and not self._session_of:
                return

    def _drain_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _collect(self, outputs: tuple[RequestOutput, ...]) -> None:
        for output in outputs:
            session_id = self._session_of.get(output.request_id)
            if session_id is None:
                continue
            session = self._sessions[session_id]
            session.outputs.append(output)
            if output.finish_reason is not None:
                session.requests.discard(output.request_id)
                del self._session_of[output.request_id]
                self._spans.end(output.request_id, reason=output.finish_reason, error=output.error_code)

    def _send_frames(self, *, idle: bool) -> None:
        assert self._deliver is not None or not self._sessions, "a session is open and nobody takes its frames"
        now_s = self._clock.monotonic_s()
        frames: dict[int, ReplicaFrame] = {}
        report: LoadReport | None = None
        for session_id, session in self._sessions.items():
            due = session.reported_serial != self._serial and (idle or now_s >= session.reported_s + self._interval_s)
            if not (session.outputs or due):
                continue
            report = report or self._report()
            frames[session_id] = self._frame(session, report, now_s)
        if frames and self._deliver is not None:
            self._deliver(frames)

    def _frame(self, session: _Session, report: LoadReport, now_s: float) -> ReplicaFrame:
        version = self._engine.residency_version
        report = replace(report, num_received=session.num_received)
        if session.residency_version != version:
            report = replace(report, resident_adapters=self._engine.resident_adapters())
        info = self.info if session.residency_version == -1 else None
        outputs, session.outputs = merge_outputs(session.outputs), []
        session.residency_version = version
        session.reported_serial = self._serial
        session.reported_s = now_s
        return ReplicaFrame(replica=info, outputs=outputs, load=report)

    def _report(self) -> LoadReport:
        report = self._engine.load_report()
        # Rounded up, so that the last free place is not withheld from everybody.
        shared = 0 if self._draining else -(-report.credits // max(1, len(self._sessions)))
        return replace(
            report,
            credits=shared,
            busy_s=self._driver.busy_s,
            prefilled_tokens=max(0, self._num_prompt_tokens - report.num_queued_tokens),
        )

    def _on_open(self, session_id: int) -> None:
        self._sessions[session_id] = _Session()

    def _on_close(self, session_id: int) -> None:
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        for request_id in session.requests:
            del self._session_of[request_id]
            self._engine.abort(request_id)
            self._spans.end(request_id)

    def _on_submit(self, session_id: int, requests: tuple[EngineRequest, ...]) -> None:
        session = self._sessions.get(session_id)
        if session is None:
            return
        session.num_received += len(requests)
        for request in requests:
            try:
                self._engine.add(request, self._clock.monotonic_s())
            except LoraplexError as error:
                refusal = request_failure(error, error.message)
                session.outputs.append(
                    RequestOutput(
                        request_id=request.request_id,
                        finish_reason=FinishReason.ERROR,
                        error=refusal.message,
                        error_code=refusal.class_code,
                    )
                )
            else:
                self._num_prompt_tokens += len(request.prompt_token_ids) + len(request.resumed_token_ids)
                session.requests.add(request.request_id)
                self._session_of[request.request_id] = session_id
                if request.traceparent is not None:
                    self._spans.begin(request)

    def _on_abort(self, session_id: int, request_ids: tuple[RequestId, ...]) -> None:
        for request_id in request_ids:
            if self._session_of.get(request_id) == session_id:
                self._collect(self._engine.abort(request_id))

    def _on_warm(self, warming: Warming) -> None:
        self._warming.end()
        self._warming = warming
        for digest in warming.digests:
            if self._engine.is_staged(digest):
                warming.staged(digest, self._engine)
            else:
                self._stager.request(digest)

    def _on_staged(self, digest: Digest, num_pages: int) -> None:
        self._collect(self._engine.adapter_staged(digest, num_pages, self._clock.monotonic_s()))
        self._warming.staged(digest, self._engine)

    def _on_stage_failed(self, digest: Digest, error: LoraplexError) -> None:
        self._collect(self._engine.adapter_failed(digest, error))
        self._warming.failed(digest)

    def _on_drain(self) -> None:
        self._draining = True
