"""Random events against the whole engine: invariants after each, and at the end exactly the right tokens."""

import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex.core.adapter import AdapterRef
from loraplex.core.errors import ContextTooLong, NotFound
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, Priority, RequestOutput, SamplingParams
from loraplex.engine import Engine, EngineConfig
from loraplex.replica.driver import StepDriver
from loraplex.testing.fake_executor import PAGE_BYTES, FakeExecutor, expected_tokens, fake_manifest, fake_model

ADAPTERS = {"a" * 64: 8, "b" * 64: 16, "c" * 64: 40, "d" * 64: 8, "e" * 64: 16}
"""Digest -> lora rank. The fourth raises in its steps, the fifth cannot be loaded."""
POISONED, UNLOADABLE = "d" * 64, "e" * 64
VOCAB = 50
EOS = 7


class StepClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(9, 28),
        max_step_tokens=st.sampled_from([4, 7, 32]),
        max_running=st.integers(1, 4),
        prefix_cache=st.booleans(),
        max_host_pages=st.sampled_from([1, 6, 100]),
        max_adapter_pages=st.sampled_from([None, 5, 6]),
        max_ahead_pages=st.sampled_from([0, 1, 4, 512]),
        max_in_flight=st.integers(1, 3),
        stages_less=st.sampled_from([None, 0, 1]),
        raises_in=st.sampled_from(["submit", "collect"]),
    )
    def start(
        self,
        num_pages: int,
        max_step_tokens: int,
        max_running: int,
        prefix_cache: bool,
        max_host_pages: int,
        max_adapter_pages: int | None,
        max_ahead_pages: int,
        max_in_flight: int,
        stages_less: int | None,
        raises_in: Literal["submit", "collect"],
    ) -> None:
        self.executor = FakeExecutor(
            model=fake_model(vocab_size=VOCAB, max_context_tokens=48, eos_token_ids=(EOS,)),
            num_pages=num_pages,
            page_size=4,
            poisoned=[POISONED],
            unloadable=[UNLOADABLE],
            max_in_flight=max_in_flight,
            num_stages=1 if stages_less is None else max(1, max_in_flight - stages_less),
            raises_in=raises_in,
        )
        self.num_glitches = 0
        config = EngineConfig(
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            prefix_cache=prefix_cache,
            max_host_bytes=max_host_pages * PAGE_BYTES,
            max_adapter_bytes=None if max_adapter_pages is None else max_adapter_pages * PAGE_BYTES,
            max_ahead_bytes=max_ahead_pages * PAGE_BYTES,
            overdue_s=3.0,
            adapter_token_price=0.5,
        )
        self.engine = Engine(
            config, model=self.executor.model, arena=self.executor.arena, num_stages=self.executor.num_stages
        )
        self.clock = StepClock()
        self.driver = StepDriver(self.engine, self.executor, clock=self.clock, unstage=self.executor.unstage_adapter)
        self.requests: dict[RequestId, EngineRequest] = {}
        self.tokens: dict[RequestId, list[int]] = defaultdict(list)
        self.finished: dict[RequestId, RequestOutput] = {}
        self.staging: list[Digest] = []
        self.aborted: set[RequestId] = set()

    @rule(
        tenant=st.sampled_from(["x", "y", "z"]),
        adapter=st.sampled_from([None, *ADAPTERS]),
        prefix=st.integers(0, 3),
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        offline=st.booleans(),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 4),
        stop=st.sampled_from([(), (11,)]),
        resumed=st.integers(0, 5),
    )
    def add(
        self,
        tenant: str,
        adapter: str | None,
        prefix: int,
        length: int,
        max_tokens: int,
        offline: bool,
        ignore_eos: bool,
        min_tokens: int,
        stop: tuple[int, ...],
        resumed: int,
    ) -> None:
        request_id = RequestId(f"r{len(self.requests)}")
        ref = None
        if adapter is not None:
            ref = AdapterRef(tenant=TenantName(tenant), name="n", version=1, digest=Digest(adapter))
        request = EngineRequest(
            request_id=request_id,
            tenant=TenantName(tenant),
            base_model_id=BaseModelId("fake-base"),
            adapter=ref,
            prompt_token_ids=tuple((prefix + i) % VOCAB for i in range(length)),
            sampling=SamplingParams(
                max_tokens=max_tokens, seed=0, ignore_eos=ignore_eos, min_tokens=min_tokens, stop_token_ids=stop
            ),
            arrival_s=self.clock.now_s,
            cache_salt=tenant,
            priority=Priority.OFFLINE if offline else Priority.ONLINE,
        )
        resumed_ids = self.reference(request)[: min(resumed, len(self.reference(request)) - 1)]
        request = replace(request, resumed_token_ids=resumed_ids)
        try:
            self.engine.add(request, self.clock.now_s)
        except ContextTooLong:
            pages = -(-min(length + max_tokens, 48) // 4) + 5
            assert length >= 48 - len(resumed_ids) or pages > self.executor.arena.num_pages
            return
        self.requests[request_id] = request
        self.tokens[request_id].extend(resumed_ids)

    @rule(count=st.integers(2, 6), seed=st.integers(0, 1 << 16))
    def burst(self, count: int, seed: int) -> None:
        """Long requests at once, so that pages run short."""
        source = random.Random(seed)
        for _ in range(count):
            self.add(
                tenant=source.choice("xyz"),
                adapter=source.choice([None, None, *ADAPTERS]),
                prefix=source.randrange(2),
                length=source.randrange(4, 24),
                max_tokens=source.randrange(10, 20),
                offline=source.random() < 0.3,
                ignore_eos=True,
                min_tokens=0,
                stop=(),
                resumed=0,
            )

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.aborted.add(request_id)
        self.take(self.engine.abort(request_id))

    @rule()
    def want(self) -> None:
        wanted = self.engine.wanted_adapters()
        assert not set(wanted) & set(self.staging), "asked twice"
        self.staging.extend(wanted)

    @precondition(lambda self: self.staging)
    @rule(fails=st.integers(0, 9))
    def stage(self, fails: int) -> None:
        digest = self.staging.pop(0)
        if fails == 0:
            self.take(self.engine.adapter_failed(digest, NotFound("no file")))
            return
        manifest = fake_manifest(digest, lora_rank=ADAPTERS[digest])
        self.executor.stage_adapter(manifest, "")
        self.take(self.engine.adapter_staged(digest, self.executor.adapter_pages(manifest), self.clock.now_s))

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.clock.now_s += 0.5
            self.take(self.driver.step().outputs)
            self.engine.validate()
            assert not self.executor.violations

    @precondition(lambda self: self.num_glitches < 5)
    @rule(call=st.sampled_from(["submit", "collect"]), steps=st.integers(0, 3))
    def glitch(self, call: Literal["submit", "collect"], steps: int) -> None:
        """One step fails through nobody's fault."""
        self.step(steps)
        self.executor.fails_once_in = call
        self.num_glitches += 1

    @invariant()
    def valid(self) -> None:
        if hasattr(self, "engine"):
            self.engine.validate()
            report = self.engine.load_report()
            assert report.num_running + report.num_waiting == self.engine.num_unfinished
            assert not self.engine.executor_broken, "adapters alone made the executor look broken"

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if self.engine.num_unfinished == 0:
                break
            self.want()
            while self.staging:
                self.stage(fails=1)
            self.clock.now_s += 0.5
            outcome = self.driver.step()
            assert not self.executor.violations
            assert outcome.progressed or self.engine.num_unfinished == 0, (
                "requests are ready, nothing runs, and no event is due"
            )
            self.take(outcome.outputs)
        assert self.engine.num_unfinished == 0, "requests starve"
        while self.engine.num_in_flight:
            assert self.driver.step().outputs == ()
        assert not self.executor.violations
        event(f"in flight: {self.executor.max_in_flight}")
        event(f"preempted: {self.engine.num_preemptions > 0}")
        self.engine.validate()
        report = self.engine.load_report()
        event(f"prefetched: {report.adapter_prefetches > 0}")
        assert report.num_free_pages == self.executor.arena.num_pages
        assert set(self.finished) == set(self.requests)
        for request_id, request in self.requests.items():
            self.check(request, self.finished[request_id])

    def check(self, request: EngineRequest, last: RequestOutput) -> None:
        reference, tokens = self.reference(request), tuple(self.tokens[request.request_id])
        assert tokens == reference[: len(tokens)], "other tokens than without preemption or neighbours"
        digest = request.adapter.digest if request.adapter is not None else None
        match last.finish_reason:
            case FinishReason.ABORT:
                assert request.request_id in self.aborted
            case FinishReason.ERROR:
                assert digest is not None or self.num_glitches
                assert last.error
                expected = {"no file"}
                if digest == POISONED or self.num_glitches:
                    expected.add("the model failed while it computed this request")
                if digest == UNLOADABLE:
                    expected.add("the adapter could not be loaded onto the accelerator")
                assert last.error in expected or "pages of memory" in last.error
                if last.error == "no file":
                    assert last.error_code == "not_found"
                elif last.error in expected:
                    assert last.error_code == "generation_failed"
                else:
                    assert last.error_code == "context_length_exceeded"
            case FinishReason.STOP:
                assert tokens == reference
                assert tokens[-1] in (EOS, 11)
            case FinishReason.LENGTH:
                assert tokens == reference
                limit = min(request.sampling.max_tokens, 48 - len(request.prompt_token_ids))
                assert len(tokens) == limit
            case None:
                pytest.fail("unfinished")

    def reference(self, request: EngineRequest) -> tuple[int, ...]:
        """All tokens of an undisturbed run."""
        sampling = request.sampling
        limit = min(sampling.max_tokens, 48 - len(request.prompt_token_ids))
        tokens = expected_tokens(request, limit, vocab_size=VOCAB)
        for index, token in enumerate(tokens):
            stops = (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids
            if stops and index >= sampling.min_tokens:
                return tokens[: index + 1]
        return tokens

    def take(self, outputs: tuple[RequestOutput, ...]) -> None:
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            assert output.request_id not in self.finished, "an output after the last"
            self.tokens[output.request_id].extend(token.token_id for token in output.tokens)
            if output.finish_reason is not None:
                self.finished[output.request_id] = output


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
