"""A driver that builds StepPlans by hand, and small random models with their transformers and PEFT references."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.model import LORA_MODULES
from loraplex.core.request import SamplingParams
from loraplex.core.step import Row, RowStart, StepPlan
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.build import load_model_spec, load_weights
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.executor import TorchExecutor
from loraplex.model_runner.rank_executor import RankExecutor
from loraplex.model_runner.shard import Shard
from loraplex.model_runner.weights import DecoderWeights
from loraplex.testing.steps import run_step

BASE = BaseModelId("base")
CPU = torch.device("cpu")
VOCAB = 199

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attn_implementation": "eager",
}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "smollm": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 11}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
}


class ArgmaxSampler:
    """Greedy, and remembers the logits of every slot in order."""

    def __init__(self) -> None:
        self.logits: dict[int, list[torch.Tensor]] = {}

    def start(self, start: RowStart) -> None:
        self.logits[start.slot] = []

    def release(self, slot: int) -> None:
        del self.logits[slot]

    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        assert logits_BV.shape[0] == len(slots)
        for row, slot in zip(logits_BV, slots, strict=True):
            self.logits[slot].append(row.clone())
        tokens_B = logits_BV.argmax(-1)
        if last_token is not None:
            last_token[torch.tensor(slots, device=last_token.device)] = tokens_B.int()
        return Drawn(slots, tokens_B, None)


@dataclass(slots=True)
class Request:
    slot: int
    prompt: list[int]
    adapter: Digest | None
    pages: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    done: int = 0
    """Tokens whose KV is written."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated


class Driver:
    """Stands in for the engine: hands out shuffled pages, sorts rows by adapter."""

    def __init__(
        self,
        directory: Path | str,
        *,
        page_size: int = 4,
        num_pages: int = 400,
        device: torch.device = CPU,
        kernels: bool = False,
        max_rows: int = 64,
        cuda_graphs: bool = False,
        dtype: torch.dtype = torch.float32,
        batch_invariant: bool = False,
        max_step_tokens: int = 1024,
        group: Callable[[ArgmaxSampler], Any] | None = None,
    ) -> None:
        """``kernels``: the Triton kernels instead of plain torch; on the CPU under the interpreter. ``group``: builds
        another executor, with ``page_size`` and ``num_pages`` as given here."""
        self._page_size = page_size
        self.sampler = ArgmaxSampler()
        if group is not None:
            self.executor = group(self.sampler)
        else:
            spec = load_model_spec(str(directory), BASE)
            shard = Shard.whole(spec)
            weights = load_weights(str(directory), shard, dtype=dtype, device=device)
            self.arena = Arena(spec, num_pages=num_pages, page_size=page_size, dtype=dtype, device=device)
            make: Any = TorchExecutor
            if kernels:
                from loraplex.model_runner.gpu.executor import GpuExecutor

                make = partial(GpuExecutor, cuda_graphs=cuda_graphs, batch_invariant=batch_invariant)
                weights = unpacked(weights)
            self.executor = make(
                shard, weights, self.arena, self.sampler, max_rows=max_rows, max_step_tokens=max_step_tokens
            )
        self._free = torch.randperm(num_pages).tolist()
        self._slots = 0
        self._requests: list[Request] = []
        self._steps = 0

    def take_pages(self, count: int) -> list[int]:
        return [self._free.pop() for _ in range(count)]

    def load(self, manifest: AdapterManifest, path: Path) -> None:
        self.executor.stage_adapter(manifest, str(path))
        pages = self.take_pages(self.executor.adapter_pages(manifest))
        self.executor.load_adapter(manifest.digest, tuple(pages))

    def open(self, prompt: list[int], adapter: Digest | None = None, *, prefix_of: Request | None = None) -> Request:
        """``prefix_of``: shares the full pages of the common prefix with that request, which has computed them."""
        self._slots += 1
        request = Request(slot=self._slots, prompt=prompt, adapter=adapter)
        if prefix_of is not None:
            size = self._page_size
            common = 0
            while common < len(prompt) - 1 and prompt[common] == prefix_of.prompt[common]:
                common += 1
            request.pages = prefix_of.pages[: common // size]
            request.done = common // size * size
        self._requests.append(request)
        return request

    def step(self, shares: Sequence[tuple[Request, int]], *, releases: tuple[int, ...] = ()) -> None:
        """Runs ``count`` known tokens of each request; appends what is sampled."""
        ordered = sorted(shares, key=lambda share: share[0].adapter or "")
        rows, starts = [], []
        for request, count in ordered:
            end = request.done + count
            missing = -(-end // self._page_size) - len(request.pages)
            request.pages += self.take_pages(max(missing, 0))
            if request.slot not in self.sampler.logits:
                starts.append(
                    RowStart(
                        slot=request.slot,
                        sampling=SamplingParams(max_tokens=100, seed=0, temperature=0.0),
                        token_ids=tuple(request.tokens),
                        num_prompt_tokens=len(request.prompt),
                    )
                )
            rows.append(
                Row(
                    slot=request.slot,
                    token_ids=tuple(request.tokens[request.done : end]),
                    start=request.done,
                    pages=tuple(request.pages),
                    adapter=request.adapter,
                    samples=end == len(request.tokens),
                )
            )
        self._steps += 1
        plan = StepPlan(step_id=self._steps, releases=releases, starts=tuple(starts), rows=tuple(rows))
        result = run_step(self.executor, plan)
        assert result.step_id == self._steps
        assert [token.slot for token in result.tokens] == [row.slot for row in rows if row.samples]
        sampled = {token.slot: token.token_id for token in result.tokens}
        for request, count in shares:
            request.done += count
            if request.slot in sampled:
                request.generated.append(sampled[request.slot])

    def close_all(self) -> None:
        """Frees the pages and slots of every request; adapters stay."""
        for request in self._requests:
            self._free += request.pages
        self._requests.clear()
        plan = StepPlan(step_id=self._steps + 1, releases=tuple(self.sampler.logits), starts=(), rows=())
        self._steps += 1
        run_step(self.executor, plan)
        self._slots = 0

    def run(self, requests: Sequence[Request], *, num_tokens: int, chunk: int = 1000) -> None:
        """Chunks of prompts mixed with decode until every request has ``num_tokens``."""
        while any(len(request.generated) < num_tokens for request in requests):
            self.step([(r, min(chunk, len(r.tokens) - r.done)) for r in requests if len(r.generated) < num_tokens])


def unpacked(weights: DecoderWeights) -> DecoderWeights:
    """As they are on a GPU."""

    def plain(part: Any) -> Any:
        tensors = {item.name: getattr(part, item.name) for item in fields(part)}
        packed = {name: value for name, value in tensors.items() if getattr(value, "is_mkldnn", False)}
        return replace(part, **{name: value.to_dense() for name, value in packed.items()})

    return replace(plain(weights), layers=tuple(plain(layer) for layer in weights.layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    directory: Path
    model: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAdapter:
    manifest: AdapterManifest
    path: Path
    name: str


def _make_base(name: str, directory: Path, **changes: Any) -> Base:
    import transformers

    class_name, options = FAMILIES[name]
    config = getattr(transformers, class_name)(**{**_COMMON, **options, **changes})
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 0.1 if key.endswith(("norm.weight", "bias")) else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if key.endswith("norm.weight") else 0.0, scale)
    model.save_pretrained(directory)
    return Base(directory=directory, model=model)


def _add_adapter(base: Base, name: str, directory: Path, dtype: torch.dtype, **options: Any) -> TrainedAdapter:
    """Random A and B through PEFT; afterwards ``base.model`` is a PeftModel holding the adapter ``name``."""
    import peft
    from safetensors.torch import load_file, save_file

    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    torch.manual_seed(len(name) + config.r)
    if isinstance(base.model, peft.PeftModel):
        base.model.add_adapter(name, config)
        model = base.model
    else:
        model = peft.get_peft_model(base.model, config, adapter_name=name)
        object.__setattr__(base, "model", model)
    blocks = []
    for layer, block in enumerate(model.get_base_model().model.layers):
        for module in LORA_MODULES:
            parent = block.mlp if module in ("gate_proj", "up_proj", "down_proj") else block.self_attn
            projection = getattr(parent, module)
            if name in getattr(projection, "lora_A", {}):
                for matrix in (projection.lora_A[name].weight, projection.lora_B[name].weight):
                    matrix.data.normal_(0.0, 0.15)
                    matrix.data.copy_(matrix.data.to(dtype))
                blocks.append(
                    AdapterBlock(
                        layer=layer, module=module, lora_rank=projection.r[name], scale=projection.scaling[name]
                    )
                )
    model.save_pretrained(directory, selected_adapters=[name])
    path = directory / name / "adapter_model.safetensors"
    if not path.exists():
        path = directory / "adapter_model.safetensors"
    save_file({key: value.to(dtype).contiguous() for key, value in load_file(path).items()}, path)
    manifest = AdapterManifest(
        digest=Digest(name), base_model_id=BASE, blocks=tuple(blocks), num_bytes=path.stat().st_size
    )
    return TrainedAdapter(manifest=manifest, path=path, name=name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _executors_end_with_their_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also where it fails: the next one needs their memory."""
    opened: list[RankExecutor] = []
    make = RankExecutor.__init__

    def make_and_note(executor: RankExecutor, *args: Any, **options: Any) -> None:
        make(executor, *args, **options)
        opened.append(executor)

    monkeypatch.setattr(RankExecutor, "__init__", make_and_note)
    yield
    for executor in opened:
        executor.close()


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """(family name, **config changes) -> a random model saved in a directory, and its transformers twin."""

    def make(name: str, **changes: Any) -> Base:
        return _make_base(name, tmp_path_factory.mktemp(name), **changes)

    return make


@pytest.fixture(scope="session")
def add_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainedAdapter]:
    """(base, name, **LoraConfig options) -> a saved adapter with random A and B."""

    def add(base: Base, name: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> TrainedAdapter:
        return _add_adapter(base, name, tmp_path_factory.mktemp(name), dtype, **options)

    return add


@pytest.fixture
def make_driver() -> Callable[..., Driver]:
    return Driver


def reference_logits(base: Base, request: Request) -> torch.Tensor:
    """(tokens, V) logits of the whole sequence in one uncached forward."""
    model = base.model
    if request.adapter is not None:
        model.set_adapter(request.adapter)
    with torch.no_grad(), model.disable_adapter() if request.adapter is None else nullcontext():
        logits: torch.Tensor = model(torch.tensor([request.tokens])).logits[0]
    return logits


@pytest.fixture
def check() -> Callable[[Base, Driver, Request], None]:
    """Asserts that each sampled token is the reference's choice after the same tokens, and that its logits agree."""

    def run(base: Base, driver: Driver, request: Request) -> None:
        expected = reference_logits(base, request)[len(request.prompt) - 1 : -1]
        actual = torch.stack(driver.sampler.logits[request.slot]).cpu()
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()
        assert request.generated == expected.argmax(-1).tolist()

    return run
