"""Small random models and adapters in files, and one load over them on any executor: for the tests of groups."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loraplex.core.adapter import AdapterBlock, AdapterManifest, AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.request import EngineRequest, FinishReason, OutputToken, Priority, SamplingParams
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner import ExecutorBase, load_model_spec
from loraplex.model_runner.weights import tensor_shapes
from loraplex.replica.driver import StepDriver
from safetensors.torch import save_file

BASE = BaseModelId("base")

_OFFLINE_STEPS = 5

_COMMON: Mapping[str, Any] = {
    # Odd: the shards of the head are not alike.
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 11},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    # Fewer KV heads than four shards.
    "qwen2-2kv": {"model_type": "qwen2", "num_key_value_heads": 2},
}


def write_model(directory: Path, family: str) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**_COMMON, **FAMILIES[family]}))
    generator = torch.Generator().manual_seed(len(family))
    tensors = {}
    for name, shape in tensor_shapes(load_model_spec_of(directory)).items():
        mean, std = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 1.5 * shape[-1] ** -0.5)
        tensors[name] = torch.empty(shape).normal_(mean, std, generator=generator)
    save_file(tensors, directory / "model.safetensors")
    return str(directory)


def load_model_spec_of(directory: Path) -> ModelSpec:
    return load_model_spec(str(directory), BASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    manifest: AdapterManifest
    path: str


def write_adapters(directory: Path, spec: ModelSpec) -> tuple[Adapter, ...]:
    """All modules, some of them, other ranks per module, and layers of one stage alone."""
    last = spec.num_layers - 1
    kinds: Mapping[str, Sequence[tuple[int, str, int]]] = {
        "all16": [(layer, module, 16) for layer in range(last + 1) for module in LORA_MODULES],
        "all5": [(layer, module, 5) for layer in range(last + 1) for module in LORA_MODULES],
        "attention": [
            (layer, module, 4 + layer) for layer in range(last + 1) for module in ("q_proj", "v_proj", "o_proj")
        ],
        "mlp": [(layer, module, 11) for layer in range(last + 1) for module in ("up_proj", "down_proj")],
        "last": [(last, module, 8) for module in ("k_proj", "gate_proj")],
    }
    return tuple(_write_adapter(directory, spec, name, kind) for name, kind in kinds.items())


def _write_adapter(directory: Path, spec: ModelSpec, name: str, kind: Sequence[tuple[int, str, int]]) -> Adapter:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    tensors = {}
    for layer, module, lora_rank in kind:
        parent = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
        inputs, outputs = spec.projection_shape(module)
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(lora_rank, inputs, generator=generator) * 0.2
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, lora_rank, generator=generator) * 0.2
    path = directory / f"{name}.safetensors"
    save_file(tensors, path)
    blocks = tuple(
        AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=1.5) for layer, module, lora_rank in kind
    )
    manifest = AdapterManifest(digest=Digest(name), base_model_id=BASE, blocks=blocks, num_bytes=path.stat().st_size)
    return Adapter(manifest=manifest, path=str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    tokens: dict[RequestId, list[OutputToken]]
    preemptions: int
    cached_tokens: int
    adapter_loads: int
    most_in_flight: int

    @classmethod
    def none(cls) -> "Outcome":
        return cls(tokens={}, preemptions=0, cached_tokens=0, adapter_loads=0, most_in_flight=0)

    @property
    def token_ids(self) -> dict[RequestId, list[int]]:
        return {request_id: [token.token_id for token in tokens] for request_id, tokens in self.tokens.items()}


def make_requests(adapters: Sequence[Adapter], *, count: int, output_tokens: int) -> list[EngineRequest]:
    """Greedy and drawn, base and every adapter in turn; of each adapter's requests all begin alike."""
    requests = []
    for index in range(count):
        adapter = [None, *adapters][index % (len(adapters) + 1)]
        ref = None
        if adapter is not None:
            digest = adapter.manifest.digest
            ref = AdapterRef(tenant=TenantName("t"), name=digest, version=1, digest=digest)
        prompt = [(7 * position + 3) % 199 for position in range(12)] + [(index + 5 * i) % 199 for i in range(index)]
        sampling = SamplingParams(
            max_tokens=output_tokens,
            seed=index,
            temperature=(0.0, 0.9)[index % 2],
            top_p=0.9,
            presence_penalty=0.3,
            ignore_eos=True,
            num_logprobs=2 if index % 3 == 0 else None,
        )
        requests.append(
            EngineRequest(
                request_id=RequestId(f"r{index}"),
                tenant=TenantName("t"),
                base_model_id=BASE,
                adapter=ref,
                prompt_token_ids=tuple(prompt),
                sampling=sampling,
                arrival_s=float(index),
                cache_salt="s",
                priority=Priority.OFFLINE if index % 4 == 3 else Priority.ONLINE,
            )
        )
    return requests


def run_load(executor: ExecutorBase, adapters: Sequence[Adapter], requests: Sequence[EngineRequest]) -> Outcome:
    """Chunked prefill, prefix hits, adapters that come and go: more than ``executor`` has pages for. The offline
    requests run already when the others come, and give way to them."""
    config = EngineConfig(max_running=6, max_step_tokens=16)
    engine = Engine(config, model=executor.model, arena=executor.arena, num_stages=executor.num_stages)
    driver = StepDriver(engine, executor, clock=SystemClock(), unstage=executor.unstage_adapter)
    by_digest = {adapter.manifest.digest: adapter for adapter in adapters}
    tokens: dict[RequestId, list[OutputToken]] = {request.request_id: [] for request in requests}
    cached_tokens = most_in_flight = 0
    late = [request for request in requests if request.priority is Priority.ONLINE]
    for request in requests:
        if request not in late:
            engine.add(request, 0.0)
    while engine.num_unfinished or late:
        if driver.num_steps >= _OFFLINE_STEPS:
            for request in late:
                engine.add(request, 0.0)
            late.clear()
        for digest in engine.wanted_adapters():
            adapter = by_digest[digest]
            executor.stage_adapter(adapter.manifest, adapter.path)
            engine.adapter_staged(digest, executor.adapter_pages(adapter.manifest), 0.0)
        outcome = driver.step()
        assert outcome.progressed
        engine.validate()
        # One of them was collected just now.
        most_in_flight = max(most_in_flight, engine.num_in_flight + 1)
        for output in outcome.outputs:
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            tokens[output.request_id] += output.tokens
            cached_tokens += output.num_cached_tokens
    report = engine.load_report()
    return Outcome(
        tokens=tokens,
        preemptions=engine.num_preemptions,
        cached_tokens=cached_tokens,
        adapter_loads=report.adapter_loads + report.adapter_prefetches,
        most_in_flight=most_in_flight,
    )
