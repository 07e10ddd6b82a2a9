"""The executor on Triton kernels equals transformers + PEFT: interpreted on the CPU, compiled where there is CUDA."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from loraplex.core.errors import BadConfig
from loraplex.model_runner.gpu.buckets import (
    MAX_SEVERAL,
    MixedBucket,
    mixed_token_buckets,
    row_buckets,
    single_buckets,
)
from loraplex.model_runner.gpu.host_step import AdapterRuns
from loraplex.model_runner.gpu.inputs import DeviceStep
from loraplex_kernels.gpu import lora_project, tuning
from loraplex_kernels.gpu.lora import ALL_SITES, ATTENTION_SITES, Site, lora_shrink

from tests.model_runner.prepared import prepare_each

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "everything": {
        "r": 16,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "large": {"r": 80, "lora_alpha": 6, "target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"]},
}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"] if CUDA else ["mistral", "qwen3"]


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 199, (length,), generator=generator).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_equal_transformers(
    family: str, make_base: Any, add_adapter: Any, make_driver: Any, check: Any
) -> None:
    base = make_base(family, num_hidden_layers=2)
    adapters = {name: add_adapter(base, name, **options) for name, options in ADAPTERS.items()}
    driver = make_driver(base.directory, page_size=16, device=DEVICE, kernels=True, cuda_graphs=CUDA)
    for adapter in adapters.values():
        driver.load(adapter.manifest, adapter.path)
    names = [None, *(adapter.manifest.digest for adapter in adapters.values())]
    requests = [driver.open(prompt(5 + 7 * index, index), name) for index, name in enumerate(names)]
    driver.run(requests, num_tokens=40 if CUDA else 2, chunk=12)
    for request in requests:
        check(base, driver, request)


def test_long_steps_fuse_the_lora_of_o_and_down(
    make_base: Any, add_adapter: Any, make_driver: Any, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What steps of thousands of tokens do, on few."""
    monkeypatch.setattr("loraplex.model_runner.gpu.inputs.mixed_tile_rows", lambda _num_tokens: 64)
    monkeypatch.setattr(tuning, "fuses_norm", lambda _num_tokens, tile_rows: tile_rows != 16)
    monkeypatch.setattr(tuning, "shrinks_ahead", lambda _num_tokens, tile_rows: tile_rows > 16)
    stand_alone: list[Site] = []

    def noted(x: Any, table: Any, layer: int, site: Site, *args: Any, **options: Any) -> None:
        stand_alone.append(site)
        lora_shrink(x, table, layer, site, *args, **options)

    monkeypatch.setattr(lora_project, "lora_shrink", noted)
    base = make_base("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    driver = make_driver(base.directory, page_size=16, device=DEVICE, kernels=True, max_rows=4)
    adapters = [add_adapter(base, name, **ADAPTERS[name]) for name in ("attention", "everything")]
    for adapter in adapters:
        driver.load(adapter.manifest, adapter.path)
    names = [None, *(adapter.manifest.digest for adapter in adapters)]
    requests = [driver.open(prompt(5 + 7 * index, index), name) for index, name in enumerate(names)]
    driver.run(requests, num_tokens=1)
    assert Site.DOWN not in stand_alone
    assert Site.O in stand_alone
    for request in requests:
        check(base, driver, request)


def test_base_only_decode_after_warm_up(make_base: Any, add_adapter: Any, make_driver: Any, check: Any) -> None:
    base = make_base("llama", num_hidden_layers=1)
    add_adapter(base, "unused", **ADAPTERS["attention"])
    driver = make_driver(
        base.directory, page_size=16, device=DEVICE, kernels=True, max_rows=4, max_step_tokens=20, cuda_graphs=True
    )
    driver.executor.warm_up()
    requests = [driver.open(prompt(6, seed)) for seed in range(2)]
    driver.run(requests, num_tokens=3)
    for request in requests:
        check(base, driver, request)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_long_context_is_cut_beside_short_ones(
    batch_invariant: bool, make_base: Any, add_adapter: Any, make_driver: Any, check: Any
) -> None:
    """In decode steps and in steps with a prompt."""
    base = make_base("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    add_adapter(base, "unused", **ADAPTERS["attention"])
    options = {"kernels": True, "max_rows": 4, "batch_invariant": batch_invariant}
    driver = make_driver(base.directory, page_size=16, device=DEVICE, **options)
    cut, run_step = [], driver.executor._run_step

    def noted(step: DeviceStep, hidden: torch.Tensor | None) -> torch.Tensor | None:
        if step.decode is not None:
            cut.append((step.prefill is None, int(step.decode[:, 5].max())))
        return run_step(step, hidden)

    driver.executor._run_step = noted
    long, short, later = (driver.open(prompt(length, length)) for length in (90, 3, 5))
    driver.run([long, short], num_tokens=2)
    driver.step([(long, 1), (short, 1), (later, 5)])
    assert cut == [(True, 3), (False, 3)]
    for request in (long, short, later):
        check(base, driver, request)


@pytest.mark.parametrize(("num_several", "prepares"), [(1, False), (2, True)])
def test_steps_padded_for_graphs_equal_transformers(
    num_several: int, prepares: bool, make_base: Any, add_adapter: Any, make_driver: Any, check: Any
) -> None:
    """Also where each is prepared before it may run."""
    base = make_base("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    adapter = add_adapter(base, "attention", **ADAPTERS["attention"])
    driver = make_driver(base.directory, page_size=16, device=DEVICE, kernels=True, max_rows=4, cuda_graphs=True)
    driver.load(adapter.manifest, adapter.path)
    names = [adapter.manifest.digest, None]
    if prepares:
        prepare_each(driver.executor)
    requests = [driver.open(prompt(9 + index, index), names[index % 2]) for index in range(3)]
    driver.run(requests[num_several:], num_tokens=1)
    driver.run(requests, num_tokens=2)
    for request in requests:
        check(base, driver, request)


def test_the_widest_graph_of_a_step_computes_the_same(
    make_base: Any, add_adapter: Any, make_driver: Any, check: Any
) -> None:
    """Steps run as the graph that has most for nothing of those that may serve them."""
    base = make_base("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    adapter = add_adapter(base, "attention", **ADAPTERS["attention"])
    driver = make_driver(base.directory, page_size=16, device=DEVICE, kernels=True, max_rows=16, cuda_graphs=True)
    driver.load(adapter.manifest, adapter.path)
    executor = driver.executor
    run_step, widened = executor._run_step, []

    def run_wider(step: DeviceStep, hidden: torch.Tensor | None) -> torch.Tensor | None:
        inputs = executor._inputs
        *_, key = inputs.wider(step)
        assert step.key is not None
        widened.append((step.key, key))
        if step.lora is not None:
            lora = replace(step.lora, num_tiles=key.num_tiles, rank_cap=key.rank_cap, sites=key.sites)
            step = replace(step, lora=lora)
        if key.num_singles is not None:
            num_sampled = key.num_singles + MAX_SEVERAL
            step = replace(
                step,
                decode=inputs._decode_parts(inputs._mixed.views[4], key.num_singles),
                sampled=inputs._mixed.views[3][:num_sampled],
                num_sampled=num_sampled,
            )
        return run_step(step, hidden)

    executor._run_step = run_wider
    # So many decode rows of one adapter that they share a tile.
    requests = [driver.open(prompt(2 + index % 2, index), adapter.manifest.digest) for index in range(8)]
    plain = driver.open(prompt(5, 9))
    driver.run([plain], num_tokens=1)
    driver.run([plain, *requests], num_tokens=1)
    driver.run([plain, *requests], num_tokens=2)
    driver.run(requests, num_tokens=3)
    for own, key in widened:
        if own.num_singles is not None:
            assert key.num_singles == 16 > own.num_singles
        if own.num_tiles:
            assert key.rank_cap == 64 > own.rank_cap
            assert key.sites == ALL_SITES != own.sites
            assert key.num_tiles > own.num_tiles or key.num_tiles == key.num_tokens
    kinds = {(own.num_singles is None, own.num_tiles > 0) for own, _ in widened}
    assert kinds >= {(True, True), (False, True), (False, False)}
    for request in (plain, *requests):
        check(base, driver, request)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("max_rows", [256, 100, 16])
def test_after_the_start_every_step_has_a_graph(max_rows: int, batch_invariant: bool, make_driver: Any) -> None:
    """Its own or a wider one: with adapters of up to 64 ranks, all decode steps and those with prompts."""
    options = {"kernels": True, "cuda_graphs": True, "batch_invariant": batch_invariant}
    options |= {"max_rows": max_rows, "max_step_tokens": 2048}
    driver = make_driver("random:tiny-llama", page_size=16, device=DEVICE, **options)
    inputs = driver.executor._inputs
    captured = {step.key for step in inputs.idle_steps()}
    runs = [
        AdapterRuns((), inputs._adapters, at_least=sites, max_rank=max_rank)
        for sites in (ALL_SITES, ATTENTION_SITES, frozenset({Site.DOWN}))
        for max_rank in (8, 16, 64)
    ]
    for num_rows in row_buckets(max_rows):
        steps = [inputs._decode_step(num_rows, 0, runs[0])]
        steps += [inputs._decode_step(num_rows, n, run) for run in runs for n in inputs._decode_tile_buckets(num_rows)]
        assert all(captured.intersection(inputs.wider(step)) for step in steps)
    for num_tokens, num_singles in product(mixed_token_buckets(2048), single_buckets(max_rows)):
        bucket = MixedBucket(num_tokens, num_singles)
        steps = [inputs._mixed_step(bucket, 0, runs[0])]
        steps += [inputs._mixed_step(bucket, n, run) for run in runs for n in inputs._tile_buckets(bucket)]
        assert all(captured.intersection(inputs.wider(step)) for step in steps), bucket


def test_projections_in_which_no_adapter_of_the_step_has_anything_run_without_lora(
    make_base: Any, add_adapter: Any, make_driver: Any, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrunk: set[Site] = set()

    def noted(x: Any, table: Any, layer: int, site: Site, *args: Any, **options: Any) -> None:
        shrunk.add(site)
        lora_shrink(x, table, layer, site, *args, **options)

    monkeypatch.setattr(lora_project, "lora_shrink", noted)
    base = make_base("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    driver = make_driver(base.directory, page_size=16, device=DEVICE, kernels=True, max_rows=4)
    attention, large = (add_adapter(base, name, **ADAPTERS[name]) for name in ("attention", "large"))
    for adapter in (attention, large):
        driver.load(adapter.manifest, adapter.path)
    first, second = (driver.open(prompt(5, index), a.manifest.digest) for index, a in enumerate((attention, large)))
    driver.run([first], num_tokens=2)
    assert shrunk == ATTENTION_SITES
    driver.run([first, second], num_tokens=1)
    assert shrunk == ALL_SITES
    for request in (first, second):
        check(base, driver, request)


def test_pages_that_are_too_small_for_an_adapter_are_told_when_it_is_staged(
    make_base: Any, add_adapter: Any, make_driver: Any
) -> None:
    base = make_base("llama", num_hidden_layers=1)
    adapter = add_adapter(base, "attention", **ADAPTERS["attention"])
    driver = make_driver(base.directory, page_size=4, device=DEVICE, kernels=True)
    driver.executor.stage_adapter(adapter.manifest, str(adapter.path))
    with pytest.raises(BadConfig, match="less than 8 LoRA ranks: raise page_size"):
        driver.executor.adapter_pages(adapter.manifest)
