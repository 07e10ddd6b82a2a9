"""Weights whose tokens say which adapter computed them, and random load on them.

Adapter k writes into its own eight directions of the hidden state, far above everything else, and the head has a token
for each sign of each direction: ``token // 16`` is k, and 0 without an adapter. Which of the sixteen depends on the KV.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from loraplex.core.adapter import AdapterBlock, AdapterManifest, AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest, FinishReason, Priority, SamplingParams
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.executor import TorchExecutor
from loraplex.model_runner.executor_base import ExecutorBase
from loraplex.model_runner.gpu.executor import GpuExecutor
from loraplex.model_runner.random_models import random_spec, random_tensors
from loraplex.model_runner.sampler import Sampler
from loraplex.model_runner.shard import Shard
from loraplex.model_runner.weights import DecoderWeights, assemble_weights
from loraplex.replica.driver import StepDriver
from safetensors.torch import save_file

CUDA = torch.cuda.is_available()
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if CUDA else "cpu")
BASE = BaseModelId("identity")
DIRECTIONS = 8
LOUD = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model and its adapters."""

    model: str
    num_layers: int
    num_adapters: int
    versions: int
    """Of each adapter: other weights under another digest, and the same tokens."""
    dtype: torch.dtype

    @property
    def spec(self) -> ModelSpec:
        spec = random_spec(self.model, BASE)
        vocab_size = 2 * DIRECTIONS * (self.num_adapters + 1)
        return replace(
            spec,
            num_layers=self.num_layers,
            vocab_size=vocab_size,
            tie_embeddings=False,
            max_context_tokens=512,
            eos_token_ids=(),
        )

    def weights(self, device: torch.device) -> DecoderWeights:
        spec = self.spec

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in random_tensors(self.model, spec, dtype=self.dtype, device=CPU):
                if name == "lm_head.weight":
                    eye = torch.eye(spec.vocab_size // 2, spec.hidden_size)
                    tensor.copy_(torch.stack([eye, -eye], dim=1).view(spec.vocab_size, spec.hidden_size))
                if name == "model.embed_tokens.weight":
                    tensor[:, 0] += 60.0
                yield name, tensor.to(device)

        return assemble_weights(Shard.whole(spec), tensors(), dtype=self.dtype, device=device, source="identity")


TINY = Shape(
    model="tiny-llama", num_layers=2, num_adapters=7 if CUDA else 4, versions=2 if CUDA else 1, dtype=torch.float32
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    identity: int
    manifest: AdapterManifest
    path: str


def make_adapters(shape: Shape, directory: Path) -> list[Adapter]:
    spec = shape.spec
    adapters = []
    for version in range(shape.versions):
        for identity in range(1, shape.num_adapters + 1):
            digest = Digest(f"{identity:032d}{version:032d}")
            generator = torch.Generator().manual_seed(1000 * identity + version)
            tensors, blocks = {}, []
            for layer in range(spec.num_layers):
                for module, parent in (("o_proj", "self_attn"), ("down_proj", "mlp")):
                    in_features, out_features = spec.projection_shape(module)
                    prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
                    a_RI = torch.randn(DIRECTIONS, in_features, generator=generator) / in_features**0.5
                    b_OR = torch.zeros(out_features, DIRECTIONS)
                    b_OR[DIRECTIONS * identity : DIRECTIONS * (identity + 1)] = LOUD * torch.eye(DIRECTIONS)
                    tensors[f"{prefix}.lora_A.weight"] = a_RI.to(shape.dtype)
                    tensors[f"{prefix}.lora_B.weight"] = b_OR.to(shape.dtype)
                    blocks.append(AdapterBlock(layer=layer, module=module, lora_rank=DIRECTIONS, scale=2.0))
            path = directory / f"{digest}.safetensors"
            save_file(tensors, path)
            manifest = AdapterManifest(
                digest=digest, base_model_id=BASE, blocks=tuple(blocks), num_bytes=path.stat().st_size
            )
            adapters.append(Adapter(identity=identity, manifest=manifest, path=str(path)))
    return adapters


def build(shape: Shape, *, num_pages: int, kernels: bool, max_rows: int, graphs: bool = True) -> ExecutorBase:
    spec, device = shape.spec, DEVICE if kernels else CPU
    arena = Arena(spec, num_pages=num_pages, page_size=16, dtype=shape.dtype, device=device)
    sampler = Sampler(spec, device)
    if not kernels:
        return TorchExecutor(
            Shard.whole(spec), shape.weights(device), arena, sampler, max_rows=max_rows, max_step_tokens=64
        )
    executor = GpuExecutor(
        Shard.whole(spec),
        shape.weights(device),
        arena,
        sampler,
        max_rows=max_rows,
        max_step_tokens=256,
        cuda_graphs=graphs,
    )
    if CUDA and graphs:
        executor.warm_up()
    return executor


def make_request(index: int, adapter: Adapter | None, source: random.Random, vocab_size: int) -> EngineRequest:
    ref = None
    if adapter is not None:
        digest = adapter.manifest.digest
        ref = AdapterRef(tenant=TenantName("t"), name=f"a{adapter.identity}", version=1, digest=digest)
    prompt = [source.randrange(vocab_size) for _ in range(source.randrange(1, 34))]
    return EngineRequest(
        request_id=RequestId(f"r{index}"),
        tenant=TenantName(f"t{index % 3}"),
        base_model_id=BASE,
        adapter=ref,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=source.randrange(2, 7), seed=0, temperature=0.0, ignore_eos=True),
        arrival_s=float(index),
        cache_salt="s",
        priority=Priority.OFFLINE if source.random() < 0.3 else Priority.ONLINE,
    )


class Load:
    """Requests come and go at random; what each got is in ``tokens``."""

    def __init__(self, executor: ExecutorBase, adapters: list[Adapter], *, seed: int, **config: int | None) -> None:
        self.executor = executor
        self.adapters = {adapter.manifest.digest: adapter for adapter in adapters}
        self.engine = Engine(
            EngineConfig(**config),  # type: ignore[arg-type]
            model=executor.model,
            arena=executor.arena,
        )
        self.driver = StepDriver(self.engine, executor, clock=SystemClock(), unstage=executor.unstage_adapter)
        self.source = random.Random(seed)
        self.requests: dict[RequestId, EngineRequest] = {}
        self.tokens: dict[RequestId, list[int]] = {}
        self.aborted: set[RequestId] = set()
        self.num_stagings = 0

    def add(self) -> None:
        adapter = self.source.choice([None, *self.adapters.values()])
        request = make_request(len(self.requests), adapter, self.source, self.executor.model.vocab_size)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = []
        self.engine.add(request, 0.0)

    def abort(self) -> None:
        request_id = self.source.choice([*self.requests][-12:])
        if self.engine.abort(request_id):
            self.aborted.add(request_id)

    def stage(self, digest: Digest) -> Digest:
        adapter = self.adapters[digest]
        self.executor.stage_adapter(adapter.manifest, adapter.path)
        return digest

    def run(self, num_requests: int, *, at_once: int, staging: ThreadPoolExecutor) -> None:
        while len(self.requests) < num_requests or self.engine.num_unfinished:
            while len(self.requests) < num_requests and self.engine.num_unfinished < at_once:
                self.add()
            if self.source.random() < 0.1:
                self.abort()
            for digest in staging.map(self.stage, self.engine.wanted_adapters()):
                self.num_stagings += 1
                pages = self.executor.adapter_pages(self.adapters[digest].manifest)
                assert not self.engine.adapter_staged(digest, pages, 0.0)
            for output in self.driver.step().outputs:
                assert output.finish_reason is not FinishReason.ERROR, output.error
                self.tokens[output.request_id] += [token.token_id for token in output.tokens]
        while self.driver.step().progressed:
            pass
        self.engine.validate()

    def check_identities(self) -> None:
        for request_id, request in self.requests.items():
            identity = 0 if request.adapter is None else self.adapters[request.adapter.digest].identity
            found = [token // (2 * DIRECTIONS) for token in self.tokens[request_id]]
            assert found == [identity] * len(found), f"{request_id} was served by another adapter"
            if request_id not in self.aborted:
                assert len(found) == request.sampling.max_tokens
