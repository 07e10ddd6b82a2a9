"""Engine and the real executor together: tokens do not depend on what memory, batch and cache do."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from loraplex.bench.random_adapters import random_manifests
from loraplex.core.adapter import AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.errors import ContextTooLong
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, SamplingParams
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.build import load_model_spec, load_weights
from loraplex.model_runner.executor_base import ExecutorBase
from loraplex.model_runner.sampler import Sampler
from loraplex.model_runner.shard import Shard
from loraplex.replica.driver import StepDriver

pytestmark = pytest.mark.beside

BASE = BaseModelId("tiny")
MODEL = "random:tiny-llama"


def torch_executor(num_pages: int, *, page_size: int = 4) -> ExecutorBase:
    config = ExecutorConfig(num_threads=1, num_pages=num_pages, page_size=page_size)
    return build_executor(config, model=MODEL, base_model_id=BASE)


def kernel_executor(num_pages: int) -> ExecutorBase:
    """Keeps two steps in flight; its kernels are interpreted where there is no CUDA."""
    from loraplex.model_runner.gpu.executor import GpuExecutor

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = load_model_spec(MODEL, BASE)
    weights = load_weights(MODEL, Shard.whole(spec), dtype=torch.float32, device=device)
    arena = Arena(spec, num_pages=num_pages, page_size=16, dtype=torch.float32, device=device)
    return GpuExecutor(Shard.whole(spec), weights, arena, Sampler(spec, device), max_rows=4, max_step_tokens=32)


def run(
    requests: list[EngineRequest],
    *,
    num_pages: int,
    build: Callable[[int], ExecutorBase] = torch_executor,
    **engine_settings: int,
) -> tuple[dict[str, list[int]], int]:
    """Tokens per request, and how often somebody was preempted."""
    executor = build(num_pages)
    adapters = random_manifests(executor.model, count=3, lora_ranks=(8,))
    config = EngineConfig(**engine_settings)  # type: ignore[arg-type]
    engine = Engine(config, model=executor.model, arena=executor.arena)
    driver = StepDriver(engine, executor, clock=SystemClock(), unstage=executor.unstage_adapter)
    for seed, manifest in enumerate(adapters):
        executor.stage_random_adapter(manifest, seed)
        engine.adapter_staged(manifest.digest, executor.adapter_pages(manifest), 0.0)
    for request in requests:
        engine.add(request, 0.0)
    tokens: dict[str, list[int]] = {}
    while engine.num_unfinished:
        outcome = driver.step()
        assert outcome.progressed
        engine.validate()
        for output in outcome.outputs:
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
    executor.close()
    return tokens, engine.num_preemptions


@pytest.fixture
def requests() -> list[EngineRequest]:
    executor = torch_executor(64)
    digests = [None, *(manifest.digest for manifest in random_manifests(executor.model, count=3, lora_ranks=(8,)))]
    vocab_size = executor.model.vocab_size
    executor.close()
    source = random.Random(0)
    return [make(i, digests[i % 4], source, vocab_size) for i in range(8)]


def make(index: int, digest: Digest | None, source: random.Random, vocab_size: int) -> EngineRequest:
    ref = None
    if digest is not None:
        ref = AdapterRef(tenant=TenantName("t"), name=f"a{index}", version=1, digest=digest)
    sampling = SamplingParams(
        max_tokens=24, seed=index, ignore_eos=True, temperature=0.0 if index % 2 else 0.8, presence_penalty=0.5
    )
    return EngineRequest(
        request_id=RequestId(f"r{index}"),
        tenant=TenantName(f"t{index % 2}"),
        base_model_id=BASE,
        adapter=ref,
        prompt_token_ids=tuple(source.randrange(vocab_size) for _ in range(source.randrange(3, 30))),
        sampling=sampling,
        arrival_s=float(index),
        cache_salt="s",
    )


def test_preempted_mixed_and_chunked_runs_give_the_tokens_of_each_request_alone(requests: list[EngineRequest]) -> None:
    alone: dict[str, list[int]] = {}
    for request in requests:
        alone |= run([request], num_pages=512)[0]
    assert all(len(tokens) == 24 for tokens in alone.values())
    roomy, _ = run(requests, num_pages=512)
    assert roomy == alone
    chunked, _ = run(requests, num_pages=512, max_step_tokens=9, max_running=5)
    assert chunked == alone


def test_a_tight_arena_changes_no_token(requests: list[EngineRequest]) -> None:
    roomy, _ = run(requests, num_pages=512)
    preemptions: list[int] = []
    for num_pages in range(16, 512, 8):
        try:
            tight, count = run(requests, num_pages=num_pages, max_running=6)
        except ContextTooLong:
            assert not preemptions, "more pages fit less"
            continue
        assert tight == roomy
        preemptions.append(count)
        if count == 0:
            break
    assert preemptions[-1] == 0
    assert max(preemptions) > 0, "no arena was tight"


def test_two_steps_in_flight_on_the_kernels_change_no_token(requests: list[EngineRequest]) -> None:
    pytest.importorskip("triton")
    few = [replace(request, sampling=replace(request.sampling, max_tokens=5)) for request in requests[:6]]
    # Random adapters are drawn in the layout of the arena: they are equal where pages are.
    alone, _ = run(few, num_pages=512, build=partial(torch_executor, page_size=16))
    ahead, _ = run(few, num_pages=24, build=kernel_executor, max_running=4, max_step_tokens=32)
    assert ahead == alone
