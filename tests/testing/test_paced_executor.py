"""The executor that keeps a profile's time."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from loraplex.core.adapter import AdapterBlock, AdapterManifest, AdapterRef
from loraplex.core.errors import BadConfig, NotFound
from loraplex.core.ids import BaseModelId, Digest, ReplicaId, RequestId, TenantName
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.plan import Shape
from loraplex.core.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from loraplex.core.step import PENDING, Row, RowStart, StepPlan
from loraplex.core.wire import ReplicaFrame
from loraplex.cost.profile import CostProfile
from loraplex.cost.step_cost import StepComposition
from loraplex.engine import EngineConfig
from loraplex.replica.engine_loop import EngineLoop
from loraplex.testing.fake_executor import fake_model
from loraplex.testing.paced_config import PacedConfig
from loraplex.testing.paced_executor import PacedExecutor, build_paced_executor, paced_cost
from loraplex.testing.steps import run_step

A = Digest("a" * 64)
RANK_16 = AdapterManifest(
    digest=A,
    base_model_id=BaseModelId("fake-base"),
    blocks=tuple(AdapterBlock(layer=0, module=module, lora_rank=16, scale=1.0) for module in LORA_MODULES),
    num_bytes=1,
)
PROFILE = CostProfile.load("h100-80gb")


class Source:
    def __init__(self, path: Path) -> None:
        path.write_bytes(b"")
        self._path = str(path)

    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        yield replace(RANK_16, digest=digest), self._path


def executor(model: ModelSpec | None = None, **options: float) -> PacedExecutor:
    config = PacedConfig(**options)  # type: ignore[arg-type]
    return build_paced_executor(config, model=model or fake_model(), engine=EngineConfig())


def request(name: str, *, adapter: bool, max_tokens: int = 40, resumed: tuple[int, ...] = ()) -> EngineRequest:
    ref = AdapterRef(tenant=TenantName("t"), name="a", version=1, digest=A)
    return EngineRequest(
        request_id=RequestId(name),
        tenant=TenantName("t"),
        base_model_id=BaseModelId("fake-base"),
        adapter=ref if adapter else None,
        prompt_token_ids=tuple(range(100)),
        sampling=SamplingParams(max_tokens=max_tokens, seed=7, num_logprobs=1),
        arrival_s=0.0,
        cache_salt=name,
        resumed_token_ids=resumed,
    )


def serve(paced: PacedExecutor, requests: tuple[EngineRequest, ...], path: Path) -> dict[str, list[RequestOutput]]:
    """Through the engine loop; the outputs of each request."""
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    ended = threading.Event()

    def deliver(frames: dict[int, ReplicaFrame]) -> None:
        for frame in frames.values():
            for output in frame.outputs:
                outputs[output.request_id].append(output)
        if all(found and found[-1].finish_reason for found in outputs.values()):
            ended.set()

    loop = EngineLoop(replica_id=ReplicaId("r"), executor=paced, engine_config=EngineConfig(), source=Source(path))
    loop.connect(deliver, on_end=lambda: None)
    loop.start()
    loop.open_session(1)
    loop.submit(1, requests)
    assert ended.wait(30)
    loop.stop()
    loop.join()
    return outputs


def token_ids(outputs: list[RequestOutput]) -> tuple[int, ...]:
    return tuple(token.token_id for output in outputs for token in output.tokens)


def test_a_request_takes_the_time_of_the_profile_and_hardly_any_cpu(tmp_path: Path) -> None:
    decode = StepComposition.of(decode_rows=1, kv_tokens=[100 + i for i in range(1, 40)])
    prefill = StepComposition.of(
        prefill_rows=1, prefill_tokens=100, prefill_pairs=100 * 101 / 2, kv_tokens=100, decode_rows=0
    )
    cost = PROFILE.step_cost("llama3-8b", "h100-80gb", Shape())
    expected_s = 3 * float(cost.latency_s(decode).sum() + cost.latency_s(prefill).sum())
    paced = executor(factor=3)
    serve(paced, (request("warm", adapter=False, max_tokens=1),), tmp_path / "file")

    start_s, cpu_s = time.monotonic(), time.process_time()
    outputs = serve(executor(factor=3), (request("r", adapter=False),), tmp_path / "file")["r"]
    elapsed_s, cpu_s = time.monotonic() - start_s, time.process_time() - cpu_s
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert len(token_ids(outputs)) == 40
    assert expected_s <= elapsed_s < 1.5 * expected_s + 0.5
    assert cpu_s < 0.5 * elapsed_s


def test_a_request_that_resumes_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    whole = serve(executor(), (request("r", adapter=True),), tmp_path / "file")["r"]
    tokens = token_ids(whole)
    assert len(set(tokens)) > 10
    assert all(token.logprob == 0.0 for output in whole for token in output.tokens)
    resumed = serve(executor(), (request("r", adapter=True, resumed=tokens[:13]),), tmp_path / "file")["r"]
    assert token_ids(resumed) == tokens[13:]
    base = serve(executor(), (request("r", adapter=False),), tmp_path / "file")["r"]
    assert token_ids(base) != tokens


def test_tokens_depend_on_seed_unless_greedy_and_never_end_a_sequence() -> None:
    ends = tuple(range(760, 1000))
    model = replace(fake_model(), eos_token_ids=ends)

    def drawn(seed: int, temperature: float) -> tuple[int, ...]:
        paced = executor(model, factor=1e-6)
        sampling = SamplingParams(max_tokens=30, seed=seed, temperature=temperature)
        start = RowStart(slot=0, sampling=sampling, token_ids=(1, 2, 3), num_prompt_tokens=3)
        row = Row(slot=0, token_ids=(1, 2, 3), start=0, pages=range(9), adapter=None, samples=True)
        tokens = []
        for step in range(30):
            plan = StepPlan(step_id=step, releases=(), starts=(start,) if step == 0 else (), rows=(row,))
            tokens.append(run_step(paced, plan).tokens[0].token_id)
            row = Row(slot=0, token_ids=(PENDING,), start=3 + step, pages=range(9), adapter=None, samples=True)
        return tuple(tokens)

    assert drawn(1, 1.0) == drawn(1, 1.0) != drawn(2, 1.0)
    assert drawn(1, 0.0) == drawn(2, 0.0)
    assert all(750 <= token < 760 for token in drawn(1, 1.0))


def test_a_step_waits_for_its_adapter_and_for_the_step_before(tmp_path: Path) -> None:
    paced = executor(factor=20)
    cost = paced_cost(PacedConfig(factor=20), EngineConfig(), BaseModelId("fake-base"))
    path = tmp_path / "file"
    path.write_bytes(b"")
    start_s = time.monotonic()
    paced.stage_adapter(RANK_16, str(path))
    whole_bytes = PROFILE.adapter_bytes("llama3-8b", 16)
    assert time.monotonic() - start_s >= 20 * PROFILE.gpu("h100-80gb").loads.disk.seconds(whole_bytes)
    assert paced.adapter_pages(RANK_16) == cost.memory.adapter_pages(16)

    sampling = SamplingParams(max_tokens=9, seed=0)
    start_s = time.monotonic()
    paced.load_adapter(A, tuple(range(40)))
    durations_s = []
    for step in (1, 2):
        start = RowStart(slot=step, sampling=sampling, token_ids=(1,), num_prompt_tokens=1)
        row = Row(slot=step, token_ids=(1,), start=0, pages=[step], adapter=A, samples=True)
        paced.submit(StepPlan(step_id=step, releases=(), starts=(start,), rows=(row,)))
    for _ in range(2):
        durations_s.append(paced.collect().duration_s)
    load_s = 20 * PROFILE.gpu("h100-80gb").loads.host.seconds(whole_bytes)
    assert time.monotonic() - start_s >= load_s + sum(durations_s)
    row_with = StepComposition.of(decode_rows=1, kv_tokens=1, num_adapters=1, adapter_bytes=whole_bytes, lora_tokens=1)
    expected_s = 20 * float(PROFILE.step_cost("llama3-8b", "h100-80gb", Shape()).latency_s(row_with)[0])
    assert durations_s == pytest.approx([expected_s, expected_s])


def test_a_pipeline_takes_the_memory_and_time_of_its_shape() -> None:
    paced = executor(pp=2, tp=2)
    memory = PROFILE.memory("llama3-8b", "h100-80gb", Shape(tp=2, pp=2), max_step_tokens=2048, max_rows=256)
    assert paced.arena.num_pages == memory.num_pages
    assert paced.arena.page_bytes == memory.page_bytes


def test_what_the_profile_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no step cost"):
        build_paced_executor(PacedConfig(tp=3), model=fake_model(), engine=EngineConfig())
    with pytest.raises(BadConfig, match="does not fit"):
        build_paced_executor(PacedConfig(base="llama3-70b"), model=fake_model(), engine=EngineConfig())
    with pytest.raises(NotFound):
        executor().stage_adapter(RANK_16, str(tmp_path / "gone"))
