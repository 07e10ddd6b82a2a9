"""The engine's door: requests, aborts, adapter events and step results go in; instructions and outputs come out.

Holds the request ids and the steps in flight; the decisions are the scheduler's. Not thread-safe, never blocks, reads
no clock. Called by ``replica.driver`` and the simulator.
"""

from collections import Counter, deque
from collections.abc import Collection

from loraplex.core.errors import BadConfig, Conflict, ContextTooLong, InvalidInput, LoraplexError
from loraplex.core.ids import Digest, RequestId, TenantName
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest, FinishReason, OutputToken, RequestOutput
from loraplex.core.step import ArenaSpec, SampledToken, StepResult
from loraplex.core.wire import LoadReport
from loraplex.engine.config import EngineConfig
from loraplex.engine.in_flight import StepInFlight
from loraplex.engine.instructions import Instructions
from loraplex.engine.limits import checked_limit
from loraplex.engine.memory import Memory
from loraplex.engine.probe import probe_request
from loraplex.engine.report import Progress, load_report, progress_of
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Sequence

_FAILURES_BEFORE_PROBE = 8


class Engine:
    """Events may come in any order between two calls. Several plans may be in flight; ``complete`` or ``step_failed``
    answers the oldest."""

    def __init__(self, config: EngineConfig, *, model: ModelSpec, arena: ArenaSpec, num_stages: int = 1) -> None:
        """``num_stages``: of the executor. Raises BadConfig when a step could not hold one token of each running
        request."""
        if config.max_running > config.max_step_tokens:
            raise BadConfig(
                f"max_running ({config.max_running}) exceeds max_step_tokens ({config.max_step_tokens})",
                param="max_running",
            )
        self._config = config
        self._model = model
        self._arena = arena
        self._memory = Memory(config, model=model, arena=arena)
        self._scheduler = Scheduler(config, self._memory, num_stages=num_stages)
        self._sequences: dict[RequestId, Sequence] = {}
        self._in_flight: deque[StepInFlight] = deque()
        self._submit_failed = False
        self._plan_is_out = False
        """The last instructions held a plan."""
        self._num_failed_alone = 0
        self._probe: Sequence | None = None
        self._executor_broken = False
        self._order = 0
        self._step_id = 0
        self._num_generated = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and not answered."""
        return len(self._in_flight)

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    @property
    def executor_broken(self) -> bool:
        """True when request after request failed although it was alone in its step, no step succeeded in between, and a
        probe failed as well: one token of the plain base, so that no tenant can bring this about with bad adapters."""
        return self._executor_broken

    @property
    def residency_version(self) -> int:
        """Changes with the set of resident adapters."""
        return self._memory.adapters.version

    def resident_adapters(self) -> tuple[Digest, ...]:
        return self._memory.adapters.resident()

    def add(self, request: EngineRequest, now_s: float) -> None:
        """Takes a request. Changes state.

        Raises InvalidInput (wrong base, empty prompt, token outside the vocabulary, nothing left to generate),
        ContextTooLong (no room for one token, or the arena can never hold it), Conflict (the id is in use).
        """
        if request.request_id in self._sequences:
            raise Conflict(f"request {request.request_id} is running already")
        sequence = self._sequence(request, now_s)
        if sequence.adapter is not None:
            self._check_fits(sequence, self._memory.adapters.num_pages(sequence.adapter))
        self._check_fits(sequence, 0)
        self._order += 1
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: RequestId) -> tuple[RequestOutput, ...]:
        """Ends a request at once; its pages are free when no step in flight holds it. Unknown ids are ignored.

        Changes state.
        """
        sequence = self._sequences.get(request_id)
        return () if sequence is None else (self._end(sequence, FinishReason.ABORT),)

    def wanted_adapters(self) -> tuple[Digest, ...]:
        """Adapters that waiting requests need in host memory; each is named once. Changes state: to staging."""
        return self._memory.adapters.take_missing()

    def adapter_staged(self, digest: Digest, num_pages: int, now_s: float) -> tuple[RequestOutput, ...]:
        """The adapter lies in host memory and will take ``num_pages`` (asked for or not). Changes state.

        Requests that cannot fit beside it end with an error.
        """
        if self._memory.adapters.is_ready(digest):
            return ()
        self._memory.adapters.staged(digest, num_pages)
        outputs: list[RequestOutput] = []
        for sequence in self._scheduler.waiting.of_adapter(digest):
            sequence.since_s = max(sequence.since_s, now_s)
            try:
                self._check_fits(sequence, num_pages)
            except InvalidInput as error:
                outputs.append(self._end(sequence, FinishReason.ERROR, error=error))
        return tuple(outputs)

    def adapter_failed(self, digest: Digest, error: LoraplexError) -> tuple[RequestOutput, ...]:
        """Staging failed: the requests that wait for it end with ``error``; a later request tries again.

        Changes state.
        """
        if self._memory.adapters.is_ready(digest):
            return ()
        outputs = self._fail_waiting(digest, error)
        self._memory.adapters.failed(digest)
        return outputs

    def is_staged(self, digest: Digest) -> bool:
        """It lies in host memory, resident or not."""
        return self._memory.adapters.is_ready(digest)

    def warm(self, digest: Digest, wanted: Collection[Digest]) -> bool:
        """Makes a staged adapter resident before anybody asks for it; False when there is no room for it beside what
        runs and the others of ``wanted``. All of ``wanted`` count as used now. Changes state."""
        return self._scheduler.warm(digest, wanted)

    def schedule(self, now_s: float) -> Instructions:
        """What to do next, also while steps are in flight; with no plan the oldest of them is to be answered first.

        Changes state.
        """
        if self._submit_failed:
            return Instructions()
        shares = self._scheduler.plan(now_s)
        unstages = self._memory.adapters.trim_host()
        drops, loads = self._memory.take_instructions()
        self._plan_is_out = bool(shares)
        if not shares:
            return Instructions(drops=drops, unstages=unstages, loads=loads)
        self._step_id += 1
        step = StepInFlight.begin(self._step_id, shares, self._scheduler.take_releases())
        self._in_flight.append(step)
        return Instructions(drops=drops, unstages=unstages, loads=loads, plan=step.plan)

    def complete(self, result: StepResult, now_s: float) -> tuple[RequestOutput, ...]:
        """The oldest step in flight ran: what it adds to each request. Changes state."""
        assert self._in_flight, "no step is in flight"
        step = self._in_flight.popleft()
        assert result.step_id == step.plan.step_id, "the result is of another step"
        self._step_ended(step)
        self._scheduler.step_done()
        self._num_failed_alone = 0
        self._charge(step)
        outputs: list[RequestOutput] = []
        sampled = iter(result.tokens)
        page_size, prefix = self._arena.page_size, self._memory.prefix
        for row, sequence in zip(step.plan.rows, step.sequences, strict=True):
            token = next(sampled) if row.samples else None
            sequence.num_in_flight -= 1
            if sequence.end_reason is not None:
                if sequence.num_in_flight == 0:
                    self._scheduler.left(sequence)
                continue
            if sequence is self._probe:
                self._end_probe()
                continue
            sequence.num_computed += len(row.token_ids)
            if sequence.num_computed // page_size > sequence.num_sealed:
                prefix.seal(sequence)
            if token is not None:
                outputs.append(self._append(sequence, token))
        assert next(sampled, None) is None, "more tokens were sampled than planned"
        return tuple(outputs)

    def loads_failed(self, failures: dict[Digest, LoraplexError]) -> tuple[RequestOutput, ...]:
        """Some loads of the last instructions failed and their plan, if any, was therefore not submitted: it is
        withdrawn, the requests of those adapters end with their error, the others are planned again. Changes state.

        The adapters are missing from now on: the caller drops them from host memory before it reports another event.
        """
        if self._plan_is_out:
            step = self._in_flight.pop()
            step.undo()
            self._scheduler.withdraw(step.plan.releases, step.starting)
            self._plan_is_out = False
        outputs: list[RequestOutput] = []
        for sequence in tuple(self._scheduler.running):
            if sequence.adapter in failures:
                outputs.append(self._end(sequence, FinishReason.ERROR, error=failures[sequence.adapter]))
        for digest, error in failures.items():
            outputs.extend(self._fail_waiting(digest, error))
            self._memory.undo_load(digest)
        return tuple(outputs)

    def submit_failed(self, error: LoraplexError) -> tuple[RequestOutput, ...]:
        """The executor refused the last plan. Changes state.

        Beside steps in flight nobody is blamed: the plan comes again when they are done.
        """
        if len(self._in_flight) == 1:
            return self.step_failed(error)
        step = self._in_flight.pop()
        step.undo()
        self._scheduler.restart(step.plan.releases, step.sequences, num_steps=1)
        self._submit_failed = True
        return ()

    def step_failed(self, error: LoraplexError) -> tuple[RequestOutput, ...]:
        """The executor raised within the oldest step in flight, and knows of no step any more. Changes state.

        Of one request it ends that with ``error``; of several nobody ends yet: smaller steps find the culprit. After
        several that failed alone in a row the next step is a probe's. What only later steps held is planned again.
        """
        assert self._in_flight, "no step is in flight"
        steps = tuple(self._in_flight)
        for step in reversed(steps):
            self._in_flight.pop()
            step.undo()
        self._step_ended(steps[-1])
        held = dict.fromkeys(sequence for step in steps for sequence in step.sequences)
        for sequence in held:
            if sequence.end_reason is not None:
                self._scheduler.left(sequence)
        self._scheduler.restart(
            [slot for step in steps for slot in step.plan.releases],
            [sequence for sequence in held if sequence.end_reason is None],
            num_steps=len(steps),
        )
        suspects = [sequence for sequence in steps[0].sequences if sequence.end_reason is None]
        outputs: list[RequestOutput] = []
        if self._probe in suspects:
            self._end_probe()
            self._executor_broken = True
        elif len(suspects) == 1:
            outputs.append(self._end(suspects[0], FinishReason.ERROR, error=error))
            self._num_failed_alone += 1
            if self._num_failed_alone == _FAILURES_BEFORE_PROBE:
                self._start_probe()
        elif suspects:
            self._scheduler.quarantine.isolate(suspects)
        return tuple(outputs)

    def _start_probe(self) -> None:
        request = probe_request(self._model.base_model_id)
        self._probe = self._sequence(request, now_s=0.0)
        self._order += 1
        self._sequences[request.request_id] = self._probe
        self._scheduler.run_alone(self._probe)

    def _end_probe(self) -> None:
        """Nobody asked for it, so nobody hears of its end."""
        assert self._probe is not None, "no probe is under way"
        self._end(self._probe, FinishReason.ABORT)
        self._probe = None

    def progress(self, request_id: RequestId) -> Progress | None:
        """How far a request is; None for one that is unknown or has ended."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else progress_of(sequence)

    def load_report(self) -> LoadReport:
        """The state as routers see it; ``credits`` is for all gateways together."""
        num_places = self._config.max_running + self._config.max_waiting
        return load_report(
            self._scheduler,
            self._memory,
            self._arena,
            num_generated=self._num_generated,
            num_free_places=num_places - len(self._sequences),
        )

    def validate(self) -> None:
        """Raises AssertionError when an invariant of any part is broken."""
        self._scheduler.validate()
        known = {*self._scheduler.running, *self._scheduler.waiting}
        assert known == set(self._sequences.values()), "a request is in no queue, or in one too many"
        rows = Counter(sequence for step in self._in_flight for sequence in step.sequences)
        for sequence in self._sequences.values():
            assert sequence.num_in_flight == rows.pop(sequence, 0), "steps that hold a request are miscounted"
            assert sequence.num_in_flight > 0 or sequence.num_scheduled == sequence.num_computed
            assert 0 <= sequence.num_known - len(sequence.token_ids) <= sequence.num_in_flight
        assert all(sequence.end_reason is not None for sequence in rows), "a step holds a request that does not run"

    def _sequence(self, request: EngineRequest, now_s: float) -> Sequence:
        return Sequence(
            request,
            order=self._order,
            now_s=now_s,
            max_tokens_total=checked_limit(request, self._model),
            eos_token_ids=self._model.eos_token_ids,
        )

    def _check_fits(self, sequence: Sequence, adapter_pages: int) -> None:
        share = self._memory.max_adapter_pages
        if self._config.max_adapter_bytes is not None and adapter_pages > share:
            raise InvalidInput(
                f"the adapter takes {adapter_pages} pages of memory; this replica keeps {share} for adapters",
                param="model",
            )
        # The last token is never read back, so its KV is not written.
        needed = self._memory.num_pages_for(sequence.max_tokens_total - 1) + adapter_pages
        if needed > self._arena.num_pages:
            raise ContextTooLong(
                f"prompt and output of {sequence.max_tokens_total} tokens"
                + (" with their adapter" if adapter_pages else "")
                + f" need {needed} pages of memory; this replica has {self._arena.num_pages}",
                param="max_tokens",
            )

    def _step_ended(self, step: StepInFlight) -> None:
        self._memory.last_done_step = step.plan.step_id
        if not self._in_flight:
            self._submit_failed = False

    def _charge(self, step: StepInFlight) -> None:
        """An aborted request still pays for what it made us compute; a row past the last token was our guess."""
        prefill_cost, decode_cost = self._config.prefill_token_cost, self._config.decode_token_cost
        costs: dict[TenantName, float] = {}
        for row, sequence in zip(step.plan.rows, step.sequences, strict=True):
            if sequence.end_reason is not None and sequence.end_reason is not FinishReason.ABORT:
                continue
            cost = decode_cost if row.samples else 0.0
            if row.start < sequence.num_prompt:
                end = min(row.start + len(row.token_ids), sequence.num_prompt)
                cost += max(0, end - max(row.start, sequence.charged_tokens)) * prefill_cost
            costs[sequence.tenant] = costs.get(sequence.tenant, 0.0) + cost / sequence.request.weight
        for tenant, cost in costs.items():
            self._scheduler.counters.charge(tenant, cost)

    def _append(self, sequence: Sequence, token: SampledToken) -> RequestOutput:
        assert token.slot == sequence.slot, "sampled tokens are not in the plan's order"
        token_id, token_ids = token.token_id, sequence.token_ids
        token_ids.append(token_id)
        self._num_generated += 1
        tokens = (OutputToken(token_id=token_id, logprob=token.logprob, top_logprobs=token.top_logprobs),)
        if token_id in sequence.stop_ids and sequence.num_generated > sequence.request.sampling.min_tokens:
            return self._end(sequence, FinishReason.STOP, tokens=tokens)
        if len(token_ids) >= sequence.max_tokens_total:
            return self._end(sequence, FinishReason.LENGTH, tokens=tokens)
        return self._output(sequence, tokens=tokens)

    def _fail_waiting(self, digest: Digest, error: LoraplexError) -> tuple[RequestOutput, ...]:
        waiting = self._scheduler.waiting.of_adapter(digest)
        return tuple(self._end(sequence, FinishReason.ERROR, error=error) for sequence in waiting)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        tokens: tuple[OutputToken, ...] = (),
        error: LoraplexError | None = None,
    ) -> RequestOutput:
        sequence.end_reason = reason
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        return self._output(sequence, tokens=tokens, reason=reason, error=error)

    @staticmethod
    def _output(
        sequence: Sequence,
        *,
        tokens: tuple[OutputToken, ...],
        reason: FinishReason | None = None,
        error: LoraplexError | None = None,
    ) -> RequestOutput:
        first, sequence.emitted = not sequence.emitted, True
        return RequestOutput(
            request_id=sequence.request_id,
            tokens=tokens,
            finish_reason=reason,
            num_cached_tokens=(sequence.num_cached or 0) if first else 0,
            error=None if error is None else error.message,
            error_code=None if error is None else error.class_code,
        )
