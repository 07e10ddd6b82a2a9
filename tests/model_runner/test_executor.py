"""The executor's contract beyond right tokens: stale pages, churn of adapters, refusals, order of a plan."""

import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.errors import BadAdapter, BadConfig, Conflict, NotFound
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.request import SamplingParams
from loraplex.core.step import ArenaSpec, Row, RowStart, StepPlan
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner import ExecutorConfig, build_executor
from loraplex.model_runner.arena import page_tokens, plan_arena
from loraplex.model_runner.build import load_model_spec
from loraplex.model_runner.executor import TorchExecutor
from loraplex.testing.steps import run_step
from safetensors.torch import save_file

BASE = BaseModelId("base")
GREEDY = SamplingParams(max_tokens=100, seed=0, temperature=0.0)


def make_adapter(
    spec: ModelSpec,
    directory: Path,
    name: str,
    ranks: dict[tuple[int, str], int],
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[AdapterManifest, str]:
    tensors, blocks = {}, []
    generator = torch.Generator().manual_seed(len(name))
    for (layer, module), lora_rank in ranks.items():
        in_features, out_features = spec.projection_shape(module)
        parent = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(lora_rank, in_features, generator=generator).to(dtype)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(out_features, lora_rank, generator=generator).to(dtype)
        blocks.append(AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=0.5))
    path = directory / f"{name}.safetensors"
    save_file(tensors, path)
    manifest = AdapterManifest(
        digest=Digest(name), base_model_id=BASE, blocks=tuple(blocks), num_bytes=path.stat().st_size
    )
    return manifest, str(path)


@pytest.fixture
def executor() -> TorchExecutor:
    return build_executor(ExecutorConfig(num_pages=64), model="random:tiny-llama", base_model_id=BASE)


def one_row(
    executor: TorchExecutor, tokens: list[int], pages: list[int], *, adapter: Digest | None = None, slot: int = 0
) -> int:
    start = RowStart(slot=slot, sampling=GREEDY, token_ids=tuple(tokens), num_prompt_tokens=len(tokens))
    row = Row(slot=slot, token_ids=tuple(tokens), start=0, pages=tuple(pages), adapter=adapter, samples=True)
    plan = StepPlan(step_id=1, releases=(), starts=(start,), rows=(row,))
    token = run_step(executor, plan).tokens[0].token_id
    run_step(executor, StepPlan(step_id=2, releases=(slot,), starts=(), rows=()))
    return token


@pytest.mark.parametrize("chunk", [1000, 3])
def test_pages_full_of_nan_from_before_do_not_reach_a_new_request(make_base: Any, make_driver: Any, chunk: int) -> None:
    base = make_base("mistral")
    clean, dirty = make_driver(base.directory), make_driver(base.directory)
    dirty.arena.pages.fill_(255)
    prompt = list(range(1, 39))
    outputs = []
    for driver in (clean, dirty):
        requests = [driver.open(prompt), driver.open(prompt[:5])]
        driver.run(requests, num_tokens=9, chunk=chunk)
        outputs.append([request.generated for request in requests])
    assert outputs[0] == outputs[1]
    assert torch.isfinite(torch.stack(dirty.sampler.logits[1])).all()


def test_a_prompt_chunk_without_sampling_gives_no_token(executor: TorchExecutor) -> None:
    start = RowStart(slot=3, sampling=GREEDY, token_ids=(5, 6, 7), num_prompt_tokens=3)
    row = Row(slot=3, token_ids=(5, 6), start=0, pages=(9,), adapter=None, samples=False)
    result = run_step(executor, StepPlan(step_id=7, releases=(), starts=(start,), rows=(row,)))
    assert result.tokens == ()
    assert result.step_id == 7
    assert result.duration_s > 0


def test_a_slot_is_released_before_it_is_started_again(executor: TorchExecutor) -> None:
    for _ in range(2):
        start = RowStart(slot=0, sampling=GREEDY, token_ids=(5, 6), num_prompt_tokens=2)
        row = Row(slot=0, token_ids=(5, 6), start=0, pages=(1,), adapter=None, samples=True)
        run_step(executor, StepPlan(step_id=1, releases=(), starts=(start,), rows=(row,)))
        run_step(executor, StepPlan(step_id=2, releases=(0,), starts=(start,), rows=()))
        run_step(executor, StepPlan(step_id=3, releases=(0,), starts=(), rows=()))


def test_a_step_over_the_limits_is_refused() -> None:
    config = ExecutorConfig(num_pages=8, max_rows=1, max_step_tokens=4)
    executor = build_executor(config, model="random:tiny-llama", base_model_id=BASE)
    row = Row(slot=0, token_ids=(1, 2, 3, 4, 5), start=0, pages=(0,), adapter=None, samples=True)
    with pytest.raises(Conflict, match="5 tokens"):
        run_step(executor, StepPlan(step_id=1, releases=(), starts=(), rows=(row,)))


def test_life_of_an_adapter(executor: TorchExecutor, tmp_path: Path) -> None:
    ranks = {(0, "q_proj"): 8, (1, "down_proj"): 20}
    manifest, path = make_adapter(executor.model, tmp_path, "a", ranks)
    num_pages = executor.adapter_pages(manifest)
    with pytest.raises(Conflict, match="not staged"):
        executor.load_adapter(manifest.digest, tuple(range(num_pages)))
    executor.stage_adapter(manifest, path)
    executor.stage_adapter(manifest, str(tmp_path / "gone"))
    with pytest.raises(Conflict, match="pages"):
        executor.load_adapter(manifest.digest, tuple(range(num_pages + 1)))
    executor.load_adapter(manifest.digest, tuple(range(10, 10 + num_pages)))
    with pytest.raises(Conflict, match="already loaded"):
        executor.load_adapter(manifest.digest, tuple(range(num_pages)))
    prompt = list(range(3, 20))
    before = one_row(executor, prompt, [1, 2], adapter=manifest.digest)
    executor.drop_adapter(manifest.digest)
    with pytest.raises(Conflict, match="not loaded"):
        one_row(executor, prompt, [1, 2], adapter=manifest.digest)
    executor.load_adapter(manifest.digest, tuple(range(40, 40 + num_pages)))
    executor.unstage_adapter(manifest.digest)
    assert one_row(executor, prompt, [1, 2], adapter=manifest.digest, slot=1) == before


def test_staging_from_many_threads(executor: TorchExecutor, tmp_path: Path) -> None:
    made = [make_adapter(executor.model, tmp_path, "x" * (1 + i), {(0, "q_proj"): 8}) for i in range(6)]
    threads = [threading.Thread(target=executor.stage_adapter, args=adapter) for adapter in made * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for page, (manifest, _) in enumerate(made):
        executor.load_adapter(manifest.digest, (page,))


def test_a_file_that_was_deleted_is_not_a_bad_one(executor: TorchExecutor, tmp_path: Path) -> None:
    manifest, path = make_adapter(executor.model, tmp_path, "gone", {(0, "q_proj"): 8})
    Path(path).unlink()
    with pytest.raises(NotFound, match="deleted"):
        executor.stage_adapter(manifest, path)


def test_every_bad_adapter_file_is_refused_by_name(executor: TorchExecutor, tmp_path: Path) -> None:
    ranks = {(0, "q_proj"): 8, (1, "down_proj"): 8}
    manifest, path = make_adapter(executor.model, tmp_path, "good", ranks)

    def refused(manifest: AdapterManifest, path: str, match: str) -> None:
        with pytest.raises(BadAdapter, match=match):
            executor.stage_adapter(manifest, path)

    refused(replace(manifest, blocks=manifest.blocks[:1]), path, "down_proj.* not in the manifest")
    more = AdapterBlock(layer=1, module="v_proj", lora_rank=8, scale=1.0)
    refused(replace(manifest, blocks=(*manifest.blocks, more)), path, "v_proj.* missing")
    other_rank = replace(manifest.blocks[0], lora_rank=4)
    refused(replace(manifest, blocks=(other_rank, manifest.blocks[1])), path, "q_proj.* expected")
    refused(replace(manifest, base_model_id=BaseModelId("other")), path, "other")
    refused(replace(manifest, blocks=(replace(more, layer=9),)), path, "layer 9")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(Path(path).read_bytes()[:-10])
    refused(manifest, str(torn), "torn")
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"a": torch.zeros(1)}, pickled)
    refused(manifest, str(pickled), "pickled")
    overflow = replace(manifest.blocks[0], scale=1e39)
    refused(replace(manifest, blocks=(overflow, manifest.blocks[1])), path, "lora_B.* not finite")
    executor.stage_adapter(manifest, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Churn:
    executor: TorchExecutor
    expected: dict[str, tuple[AdapterManifest, int]]
    """Of each staged adapter, the token that it samples from fresh pages."""


CHURN_PROMPT = list(range(9, 25))


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Churn:
    executor = build_executor(ExecutorConfig(num_pages=40), model="random:tiny-llama", base_model_id=BASE)
    expected = {}
    all_modules = {(layer, module): 16 for layer in range(2) for module in LORA_MODULES}
    for name, ranks in {"s": {(0, "q_proj"): 8}, "mm": {(1, "up_proj"): 24}, "lll": all_modules}.items():
        manifest, path = make_adapter(executor.model, tmp_path_factory.mktemp("churn"), name, ranks)
        executor.stage_adapter(manifest, path)
        executor.load_adapter(manifest.digest, tuple(range(2, 2 + executor.adapter_pages(manifest))))
        expected[name] = manifest, one_row(executor, CHURN_PROMPT, [0], adapter=manifest.digest)
        executor.drop_adapter(manifest.digest)
    assert len({token for _, token in expected.values()}) == 3
    return Churn(executor=executor, expected=expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_after_any_churn_an_adapter_that_fits_loads_and_acts_the_same(data: st.DataObject, churn: Churn) -> None:
    executor = churn.executor
    free = set(range(2, 40))
    held: dict[str, tuple[int, ...]] = {}
    try:
        for _ in range(data.draw(st.integers(1, 12))):
            name = data.draw(st.sampled_from(sorted(churn.expected)))
            manifest, _ = churn.expected[name]
            if name in held:
                executor.drop_adapter(manifest.digest)
                free |= set(held.pop(name))
            elif len(free) >= executor.adapter_pages(manifest):
                order = data.draw(st.permutations(sorted(free)))
                held[name] = tuple(order[: executor.adapter_pages(manifest)])
                free -= set(held[name])
                executor.load_adapter(manifest.digest, held[name])
            for other in held:
                manifest, token = churn.expected[other]
                assert one_row(executor, CHURN_PROMPT, [1], adapter=manifest.digest) == token
    finally:
        for name in held:
            executor.drop_adapter(churn.expected[name][0].digest)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (ExecutorConfig(num_pages=4, arena_bytes=10), "num_pages or arena_bytes"),
        (ExecutorConfig(arena_bytes=100), "no room"),
        (ExecutorConfig(device="warp"), "warp"),
        (ExecutorConfig(device="mps"), "mps"),
    ],
)
def test_options_that_contradict(config: ExecutorConfig, match: str) -> None:
    with pytest.raises(BadConfig, match=match):
        build_executor(config, model="random:tiny-llama", base_model_id=BASE)


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys; from loraplex.model_runner import ExecutorConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_says_so() -> None:
    with pytest.raises(BadConfig, match="no CUDA device"):
        build_executor(ExecutorConfig(device="cuda"), model="random:tiny-llama", base_model_id=BASE)


def test_arena_bytes_are_an_upper_bound() -> None:
    config = ExecutorConfig(arena_bytes=100_000, page_size=8)
    executor = build_executor(config, model="random:tiny-llama", base_model_id=BASE)
    arena = executor.arena
    assert arena.page_bytes == 8 * executor.model.kv_elements_per_token * 4
    assert arena.num_pages == 100_000 // arena.page_bytes
    executor.close()
    executor.close()


def test_without_adapters_the_whole_pool_is_kv() -> None:
    """8B in bf16 beside 16 GB of weights on an 80 GB device: 8192 tokens of KV a GiB, all but 3 %."""
    spec = load_model_spec("random:llama3-8b", BASE)
    config = ExecutorConfig(device="cuda")
    room_bytes = int(0.9 * 80e9 - 16e9)
    plan = plan_arena(config, spec, room_bytes=room_bytes, itemsize=2)
    taken_bytes = plan.num_pages * plan.page_bytes + plan.record_bytes + plan.page_table_bytes
    page_size = page_tokens(config, (spec,))
    tokens_per_gib = plan.num_pages * page_size / (taken_bytes / 2**30)
    assert 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2 == 131072
    assert tokens_per_gib >= 0.97 * 2**30 / 131072
    assert plan.kv_share == pytest.approx(tokens_per_gib / 8192)
    page = plan.page_bytes + plan.record_bytes // plan.num_pages
    assert room_bytes - page < taken_bytes + plan.step_bytes <= room_bytes
    arena = ArenaSpec(num_pages=plan.num_pages, page_size=page_size, page_bytes=plan.page_bytes)
    engine = Engine(EngineConfig(), model=spec, arena=arena)
    assert engine.load_report().num_free_pages == plan.num_pages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_runs(dtype: Any, tmp_path: Path) -> None:
    executor = build_executor(ExecutorConfig(num_pages=30, dtype=dtype), model="random:tiny-qwen3", base_model_id=BASE)
    manifest, path = make_adapter(
        executor.model, tmp_path, "a", {(0, "q_proj"): 8, (1, "up_proj"): 8}, dtype=torch.bfloat16
    )
    executor.stage_adapter(manifest, path)
    executor.load_adapter(manifest.digest, tuple(range(executor.adapter_pages(manifest))))
    assert 0 <= one_row(executor, list(range(4, 30)), [20, 21], adapter=manifest.digest) < executor.model.vocab_size
