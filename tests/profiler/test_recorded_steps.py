"""Recorded steps account for every token of a load, once, and for all time in which requests ran."""

from types import SimpleNamespace

import pytest
from loraplex.bench import recorder
from loraplex.bench.options import EngineLoad, EngineSetup
from loraplex.bench.recorder import RecordingEngine
from loraplex.bench.session import BenchSession
from loraplex.core.clock import SystemClock
from loraplex.core.ids import BaseModelId, RequestId, TenantName
from loraplex.core.plan import Shape
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.cost.memory import whole_adapter_bytes
from loraplex.engine import EngineConfig
from loraplex.replica.driver import StepDriver
from loraplex.testing.fake_executor import FakeExecutor


def test_every_token_is_in_one_step() -> None:
    session = BenchSession(
        EngineSetup(model="random:tiny-llama", threads=1, num_pages=400, max_running=4, max_step_tokens=32)
    )
    load = EngineLoad(requests=6, adapters=2, lora_ranks=(8, 12), input_tokens=40, output_tokens=5, concurrency=3)
    manifests = session.prepare(load)
    requests = session.requests(load, manifests)
    requests.append(session.request(None, input_tokens=7, output_tokens=3))
    session.engine.clear()
    session.drive(requests, concurrency=3)
    steps = session.engine.composition(manifests)
    assert len(steps) == len(session.engine.step_seconds())
    lora_tokens, base_tokens = 6 * (40 + 4), 7 + 2
    assert (steps.prefill_tokens + steps.decode_rows).sum() == lora_tokens + base_tokens
    assert steps.lora_tokens.sum() == lora_tokens
    assert (steps.prefill_tokens + steps.decode_rows).max() <= 32
    small, large = (whole_adapter_bytes(session.executor.model, rank, itemsize=4) for rank in (8, 16))
    assert set(steps.adapter_bytes.tolist()) <= {0, small, large, small + large}
    assert steps.adapter_bytes.max() == small + large
    assert session.itemsize == 4
    session.close()


def _request(name: str, max_tokens: int) -> EngineRequest:
    return EngineRequest(
        request_id=RequestId(name),
        tenant=TenantName("t"),
        base_model_id=BaseModelId("fake-base"),
        adapter=None,
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True),
        arrival_s=0.0,
        cache_salt=name,
    )


def test_what_lies_between_steps_counts_while_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: now_s))
    executor = FakeExecutor()
    collect = executor.collect

    def takes_a_second() -> object:
        nonlocal now_s
        now_s += 1.0
        return collect()

    monkeypatch.setattr(executor, "collect", takes_a_second)
    engine = RecordingEngine(EngineConfig(), executor, itemsize=2, shape=Shape())
    driver = StepDriver(engine, executor, clock=SystemClock(), unstage=executor.unstage_adapter)
    engine.add(_request("first", 3), 0.0)
    while driver.step().progressed:
        now_s += 0.25
    # Idle for a while, then one that is given up, and idle again.
    now_s = 10.0
    engine.add(_request("second", 3), 0.0)
    driver.step()
    engine.abort(RequestId("second"))
    assert not driver.step().progressed
    now_s = 20.0
    engine.add(_request("third", 1), 0.0)
    driver.step()
    assert engine.step_seconds().tolist() == [1.0, 1.25, 1.25, 1.0, 1.0]
    assert engine.step_starts().tolist() == [0.0, 1.0, 2.25, 10.0, 20.0]
    assert engine.lone().all()


def test_a_request_by_itself_has_the_pipeline_for_itself() -> None:
    executor = FakeExecutor(max_in_flight=2, num_stages=2)
    engine = RecordingEngine(EngineConfig(max_running=4), executor, itemsize=2, shape=Shape(pp=2))
    driver = StepDriver(engine, executor, clock=SystemClock(), unstage=executor.unstage_adapter)
    engine.add(_request("alone", 4), 0.0)
    while driver.step().progressed:
        pass
    assert engine.lone().tolist() == [True] * 4
    for name in ("first", "second"):
        engine.add(_request(name, 1), 0.0)
        plan = engine.schedule(0.0).plan
        assert plan is not None
        executor.submit(plan)
    for _ in range(2):
        engine.complete(executor.collect(), 0.0)
    assert engine.lone().tolist() == [True] * 4 + [False] * 2
    assert engine.overlapped().tolist() == [False] * 5 + [True]
