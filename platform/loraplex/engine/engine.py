"""The engine's door: requests, aborts, adapter events and step results go in; instructions and outputs come out.

Holds the request ids and the one step under way; the decisions are the scheduler's. Not thread-safe, never blocks,
reads no clock. Called by ``replica.driver`` and the simulator.
"""

from loraplex.core.errors import BadConfig, Conflict, ContextTooLong, InvalidInput, LoraplexError
from loraplex.core.ids import Digest, RequestId
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest, FinishReason, OutputToken, RequestOutput
from loraplex.core.step import ArenaSpec, Row, RowStart, SampledToken, StepPlan, StepResult
from loraplex.core.wire import LoadReport
from loraplex.engine.config import EngineConfig
from loraplex.engine.instructions import Instructions
from loraplex.engine.memory import Memory
from loraplex.engine.probe import probe_request
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Sequence

_FAILURES_BEFORE_PROBE = 8


class Engine:
    """Events may come in any order between two calls; ``complete`` or ``step_failed`` answers each plan."""

    def __init__(self, config: EngineConfig, *, model: ModelSpec, arena: ArenaSpec) -> None:
        """Raises BadConfig when a step could not hold one token of each running request."""
        if config.max_running > config.max_step_tokens:
            raise BadConfig(
                f"max_running ({config.max_running}) exceeds max_step_tokens ({config.max_step_tokens})",
                param="max_running",
            )
        self._config = config
        self._model = model
        self._arena = arena
        self._memory = Memory(config, model=model, arena=arena)
        self._scheduler = Scheduler(config, self._memory)
        self._sequences: dict[RequestId, Sequence] = {}
        self._plan: StepPlan | None = None
        self._in_step: dict[Sequence, int] = {}
        self._starting: list[Sequence] = []
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
        limit = self._checked_limit(request)
        sequence = Sequence(request, order=self._order, now_s=now_s, max_tokens_total=limit)
        if sequence.adapter is not None:
            self._check_fits(sequence, self._memory.adapters.num_pages(sequence.adapter))
        self._check_fits(sequence, 0)
        self._order += 1
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: RequestId) -> tuple[RequestOutput, ...]:
        """Ends a request; its pages are free at once, or after the step that it is in. Unknown ids are ignored.

        Changes state.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.aborted:
            return ()
        if sequence in self._in_step:
            sequence.aborted = True
            return ()
        return (self._end(sequence, FinishReason.ABORT),)

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

    def schedule(self, now_s: float) -> Instructions:
        """What to do next. Changes state; a plan in the answer must be answered before the next call."""
        assert self._plan is None, "the step under way was not completed"
        shares = self._scheduler.plan(now_s)
        unstages = self._memory.adapters.trim_host()
        drops, loads = self._memory.take_instructions()
        if shares:
            self._plan = self._build_plan(shares)
        return Instructions(drops=drops, unstages=unstages, loads=loads, plan=self._plan)

    def complete(self, result: StepResult, now_s: float) -> tuple[RequestOutput, ...]:
        """The step ran: what it adds to each request. Changes state."""
        assert self._plan is not None, "no step is under way"
        assert result.step_id == self._plan.step_id, "the result is of another step"
        sampled = {token.slot: token for token in result.tokens}
        in_step = self._take_step()
        self._scheduler.step_done()
        self._num_failed_alone = 0
        outputs = (self._advance(sequence, count, sampled) for sequence, count in in_step.items())
        return tuple(output for output in outputs if output is not None)

    def loads_failed(self, failures: dict[Digest, LoraplexError]) -> tuple[RequestOutput, ...]:
        """Some loads of the last instructions failed and the plan was therefore not executed: it is withdrawn, the
        requests of those adapters end with their error, the others are planned again. Changes state.

        The adapters are missing from now on: the caller drops them from host memory before it reports another event.
        """
        assert self._plan is not None, "no step is under way"
        releases, starting = self._plan.releases, self._starting
        in_step = self._take_step()
        self._scheduler.withdraw(releases, starting)
        outputs: list[RequestOutput] = []
        for sequence in in_step:
            if sequence.aborted:
                outputs.append(self._end(sequence, FinishReason.ABORT))
            elif sequence.adapter in failures:
                outputs.append(self._end(sequence, FinishReason.ERROR, error=failures[sequence.adapter]))
        for digest, error in failures.items():
            outputs.extend(self._fail_waiting(digest, error))
            self._memory.undo_load(digest)
        return tuple(outputs)

    def step_failed(self, error: LoraplexError) -> tuple[RequestOutput, ...]:
        """The executor raised within the step. Changes state.

        Of one request it ends that with ``error``; of several nobody ends yet: smaller steps find the culprit. After
        several that failed alone in a row the next step is a probe's.
        """
        assert self._plan is not None, "no step is under way"
        releases = self._plan.releases
        in_step = self._take_step()
        self._scheduler.step_done()
        sequences = list(in_step)
        self._scheduler.restart(releases, sequences)
        outputs = [self._end(s, FinishReason.ABORT) for s in sequences if s.aborted]
        suspects = [sequence for sequence in sequences if not sequence.aborted]
        if self._probe in suspects:
            self._end_probe()
            self._executor_broken = True
        elif len(suspects) == 1:
            outputs.append(self._end(suspects[0], FinishReason.ERROR, error=error))
            self._num_failed_alone += 1
            if self._num_failed_alone == _FAILURES_BEFORE_PROBE:
                self._start_probe()
        elif suspects:
            self._scheduler.isolate(suspects)
        return tuple(outputs)

    def _start_probe(self) -> None:
        request = probe_request(self._model.base_model_id)
        limit = self._checked_limit(request)
        self._probe = Sequence(request, order=self._order, now_s=0.0, max_tokens_total=limit)
        self._order += 1
        self._sequences[request.request_id] = self._probe
        self._scheduler.run_alone(self._probe)

    def _end_probe(self) -> None:
        """Nobody asked for it, so nobody hears of its end."""
        assert self._probe is not None, "no probe is under way"
        self._end(self._probe, FinishReason.ABORT)
        self._probe = None

    def load_report(self) -> LoadReport:
        """The state as routers see it; ``credits`` is for all gateways together."""
        scheduler = self._scheduler
        queued = sum(s.num_uncomputed for s in scheduler.running if s.num_uncomputed > 1)
        return LoadReport(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_pages=self._memory.num_available,
            num_queued_tokens=queued + scheduler.waiting.num_tokens,
            credits=max(0, self._config.max_running + self._config.max_waiting - len(self._sequences)),
            steps=self._step_id,
            generated_tokens=self._num_generated,
        )

    def validate(self) -> None:
        """Raises AssertionError when an invariant of any part is broken."""
        self._scheduler.validate()
        known = {*self._scheduler.running, *self._scheduler.waiting}
        assert known == set(self._sequences.values()), "a request is in no queue, or in one too many"
        assert set(self._in_step) <= set(self._scheduler.running), "a step holds a request that does not run"

    def _checked_limit(self, request: EngineRequest) -> int:
        """Prompt + output tokens at most."""
        num_prompt, num_resumed = len(request.prompt_token_ids), len(request.resumed_token_ids)
        if request.base_model_id != self._model.base_model_id:
            raise InvalidInput(f"this replica serves {self._model.base_model_id}, not {request.base_model_id}")
        if num_prompt == 0:
            raise InvalidInput("the prompt is empty", param="prompt")
        for ids in (request.prompt_token_ids, request.resumed_token_ids):
            if ids and not (min(ids) >= 0 and max(ids) < self._model.vocab_size):
                raise InvalidInput("a token id lies outside the vocabulary", param="prompt")
        limit = min(num_prompt + request.sampling.max_tokens, self._model.max_context_tokens)
        if num_prompt + num_resumed >= self._model.max_context_tokens:
            raise ContextTooLong(
                f"{num_prompt + num_resumed} tokens leave no room in the context of "
                f"{self._model.max_context_tokens} tokens",
                param="prompt",
            )
        if num_prompt + num_resumed >= limit:
            raise InvalidInput("no token is left to generate", param="max_tokens")
        return limit

    def _check_fits(self, sequence: Sequence, adapter_pages: int) -> None:
        share = self._config.max_adapter_pages
        if share is not None and adapter_pages > share:
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

    def _build_plan(self, shares: dict[Sequence, int]) -> StepPlan:
        rows: list[Row] = []
        starts: list[RowStart] = []
        self._step_id += 1
        self._in_step = dict(sorted(shares.items(), key=lambda item: item[0].adapter or ""))
        self._starting = [sequence for sequence in self._in_step if sequence.needs_start]
        for sequence, count in self._in_step.items():
            assert sequence.slot is not None, "a request without a slot was planned"
            start = sequence.num_computed
            if sequence.needs_start:
                sequence.needs_start = False
                starts.append(
                    RowStart(
                        slot=sequence.slot,
                        sampling=sequence.request.sampling,
                        token_ids=tuple(sequence.token_ids),
                        num_prompt_tokens=sequence.num_prompt,
                    )
                )
            rows.append(
                Row(
                    slot=sequence.slot,
                    token_ids=tuple(sequence.token_ids[start : start + count]),
                    start=start,
                    pages=sequence.pages,
                    adapter=sequence.adapter,
                    samples=start + count == len(sequence.token_ids),
                )
            )
        return StepPlan(
            step_id=self._step_id,
            releases=self._scheduler.take_releases(),
            starts=tuple(starts),
            rows=tuple(rows),
        )

    def _take_step(self) -> dict[Sequence, int]:
        assert self._plan is not None, "no step is under way"
        self._memory.last_done_step = self._plan.step_id
        in_step, self._in_step = self._in_step, {}
        self._plan, self._starting = None, []
        return in_step

    def _advance(self, sequence: Sequence, count: int, sampled: dict[int, SampledToken]) -> RequestOutput | None:
        assert sequence.slot is not None, "a request in a step has no slot"
        self._charge(sequence, count)
        token = sampled.get(sequence.slot)
        assert (token is not None) == (count == sequence.num_uncomputed), "sampled tokens differ from the plan"
        if sequence.aborted:
            return self._end(sequence, FinishReason.ABORT)
        if sequence is self._probe:
            self._end_probe()
            return None
        sequence.num_computed += count
        self._memory.prefix.seal(sequence)
        if token is None:
            return None
        sequence.token_ids.append(token.token_id)
        self._num_generated += 1
        output = OutputToken(token_id=token.token_id, logprob=token.logprob, top_logprobs=token.top_logprobs)
        reason = self._finish_reason(sequence)
        if reason is not None:
            return self._end(sequence, reason, tokens=(output,))
        return self._output(sequence, tokens=(output,))

    def _charge(self, sequence: Sequence, count: int) -> None:
        start, end = sequence.num_computed, sequence.num_computed + count
        prefilled = min(end, sequence.num_prompt) - max(start, sequence.charged_tokens)
        cost = max(0, prefilled) * self._config.prefill_token_cost
        sequence.charged_tokens = max(sequence.charged_tokens, end)
        if end == len(sequence.token_ids):
            cost += self._config.decode_token_cost
        self._scheduler.counters.charge(sequence.tenant, cost)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        sampling, token_id = sequence.request.sampling, sequence.token_ids[-1]
        if sequence.num_generated > sampling.min_tokens:
            if token_id in self._model.eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.token_ids) >= sequence.max_tokens_total else None

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
