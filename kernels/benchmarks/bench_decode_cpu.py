"""Decode steps on the CPU: ours with the base and with three adapters, transformers, PEFT's mixed batch.

Random weights of SmolLM2-135M's shape in fp32, the same for all. They run in turns, so that whatever else the machine
does hits all of them alike; the medians are compared. Prints one JSON object.

    python kernels/benchmarks/bench_decode_cpu.py --batches 8,32 --context 128 --steps 20 --threads 2
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.request import SamplingParams
from loraplex.core.step import Row, RowStart, StepPlan
from loraplex.model_runner import ExecutorBase, ExecutorConfig, build_executor
from loraplex.model_runner.random_models import random_tensors
from loraplex.testing.steps import run_step
from safetensors.torch import save_file

SHAPE = "smollm2-135m"
ADAPTERS = {
    "r8": (8, ("q_proj", "v_proj")),
    "r16": (16, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "r32": (32, ("gate_proj", "up_proj", "down_proj")),
}


class OurBatch:
    """Rows of one batch, prefilled; each ``step`` decodes one token a row."""

    def __init__(
        self, executor: ExecutorBase, prompts: list[list[int]], adapters: list[str | None], pages: list[int], slot: int
    ) -> None:
        self._executor = executor
        self._adapters = sorted(adapters, key=lambda name: name or "")
        self._pages = self._split(pages, len(prompts))
        self._slots = list(range(slot, slot + len(prompts)))
        self._length = len(prompts[0])
        self._last = [0] * len(prompts)
        for index, prompt in enumerate(prompts):
            start = RowStart(
                slot=self._slots[index],
                sampling=SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0),
                token_ids=tuple(prompt),
                num_prompt_tokens=len(prompt),
            )
            self._run((start,), (self._row(index, tuple(prompt), 0),))

    def step(self) -> None:
        rows = tuple(self._row(index, (token,), self._length) for index, token in enumerate(self._last))
        self._run((), rows)
        self._length += 1

    def _run(self, starts: tuple[RowStart, ...], rows: tuple[Row, ...]) -> None:
        result = run_step(self._executor, StepPlan(step_id=0, releases=(), starts=starts, rows=rows))
        for token in result.tokens:
            self._last[self._slots.index(token.slot)] = token.token_id

    def _row(self, index: int, token_ids: tuple[int, ...], start: int) -> Row:
        adapter = self._adapters[index]
        return Row(
            slot=self._slots[index],
            token_ids=token_ids,
            start=start,
            pages=self._pages[index],
            adapter=None if adapter is None else Digest(adapter),
            samples=True,
        )

    @staticmethod
    def _split(pages: list[int], parts: int) -> list[tuple[int, ...]]:
        size = len(pages) // parts
        return [tuple(pages[i * size : (i + 1) * size]) for i in range(parts)]


class TransformersBatch:
    """The same prompts through ``LlamaForCausalLM`` with sdpa and a DynamicCache."""

    def __init__(self, model: Any, prompts: list[list[int]], **forward: Any) -> None:
        """``forward``: further arguments of each call, such as PEFT's ``adapter_names``."""
        self._model = model
        self._forward = forward
        self._cache = transformers.DynamicCache(config=model.config)
        self._ids = torch.tensor(prompts)
        self.step()

    def step(self) -> None:
        with torch.inference_mode():
            out = self._model(self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **self._forward)
            self._ids = out.logits[:, -1].argmax(-1, keepdim=True)
            self._ids.tolist()


def transformers_model(executor: ExecutorBase) -> Any:
    spec = executor.model
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_context_tokens,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=spec.tie_embeddings,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    weights = dict(random_tensors(SHAPE, spec, dtype=torch.float32, device=torch.device("cpu")))
    model.load_state_dict(weights, strict=False)
    return model


def write_adapters(executor: ExecutorBase, directory: Path) -> None:
    """PEFT directories with random A and B, small enough to leave the activations in range."""
    spec = executor.model
    for name, (lora_rank, modules) in ADAPTERS.items():
        tensors = {}
        for layer in range(spec.num_layers):
            for module in modules:
                in_features, out_features = spec.projection_shape(module)
                parent = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(lora_rank, in_features) * in_features**-0.5
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(out_features, lora_rank) * 0.01
        (directory / name).mkdir()
        save_file(tensors, directory / name / "adapter_model.safetensors")
        config = peft.LoraConfig(
            r=lora_rank, lora_alpha=lora_rank, target_modules=list(modules), task_type="CAUSAL_LM", inference_mode=True
        )
        config.save_pretrained(directory / name)


def load_adapters(executor: ExecutorBase, directory: Path, pages: list[int]) -> None:
    """Takes their pages from the end of ``pages``."""
    for name, (lora_rank, modules) in ADAPTERS.items():
        blocks = tuple(
            AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=1.0)
            for layer in range(executor.model.num_layers)
            for module in modules
        )
        manifest = AdapterManifest(
            digest=Digest(name), base_model_id=executor.model.base_model_id, blocks=blocks, num_bytes=0
        )
        executor.stage_adapter(manifest, str(directory / name / "adapter_model.safetensors"))
        own = tuple(pages.pop() for _ in range(executor.adapter_pages(manifest)))
        executor.load_adapter(manifest.digest, own)
        executor.unstage_adapter(manifest.digest)


def peft_model(executor: ExecutorBase, directory: Path) -> Any:
    first, *others = ADAPTERS
    model: Any = peft.PeftModel.from_pretrained(
        transformers_model(executor), directory / first, adapter_name=first
    ).eval()
    for name in others:
        model.load_adapter(directory / name, adapter_name=name)
    return model


def measure(contenders: dict[str, Callable[[], None]], steps: int) -> dict[str, float]:
    """Median milliseconds of a step of each, run in turns after two rounds of warm-up."""
    times_ms: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(steps + 2):
        for name, step in contenders.items():
            started = time.perf_counter()
            step()
            if round_ >= 2:
                times_ms[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times_ms.items()}


def bench_batch(
    executor: ExecutorBase, model: Any, with_peft: Any, directory: Path, *, batch: int, context: int, steps: int
) -> dict[str, float]:
    pages = list(range(executor.arena.num_pages))
    random.Random(0).shuffle(pages)
    load_adapters(executor, directory, pages)
    draw = random.Random(1)
    prompts = [[draw.randrange(executor.model.vocab_size) for _ in range(context)] for _ in range(batch)]
    names = list(ADAPTERS)
    mixed: list[str | None] = [names[index % len(names)] for index in range(batch)]
    half = len(pages) // 2
    ours = OurBatch(executor, prompts, [None] * batch, pages[:half], slot=0)
    ours_mixed = OurBatch(executor, prompts, mixed, pages[half:], slot=batch)
    theirs = TransformersBatch(model, prompts)
    peft_mixed = TransformersBatch(with_peft, prompts, adapter_names=mixed)
    medians = measure(
        {
            "ours": ours.step,
            "transformers": theirs.step,
            "mixed": ours_mixed.step,
            "peft_mixed": peft_mixed.step,
        },
        steps,
    )
    run_step(executor, StepPlan(step_id=0, releases=tuple(range(2 * batch)), starts=(), rows=()))
    for name in names:
        executor.drop_adapter(Digest(name))
    return {
        "batch": batch,
        **{f"{name}_ms": round(value, 2) for name, value in medians.items()},
        "ours_over_transformers": round(medians["transformers"] / medians["ours"], 3),
        "mixed_over_base": round(medians["ours"] / medians["mixed"], 3),
        "mixed_over_peft_mixed": round(medians["peft_mixed"] / medians["mixed"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    row_pages = (options.context + options.steps + 2) // 16 + 1
    config = ExecutorConfig(num_threads=options.threads, num_pages=2 * max(batches) * row_pages + 200)
    executor = build_executor(config, model=f"random:{SHAPE}", base_model_id=BaseModelId(SHAPE))
    model = transformers_model(executor)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_adapters(executor, directory)
        with_peft = peft_model(executor, directory)
        results = [
            bench_batch(
                executor, model, with_peft, directory, batch=batch, context=options.context, steps=options.steps
            )
            for batch in batches
        ]
    sizes = {"shape": SHAPE, "context": options.context, "steps": options.steps, "threads": options.threads}
    print(json.dumps({**sizes, "torch": torch.__version__, "dtype": "float32", "results": results}))


if __name__ == "__main__":
    main()
