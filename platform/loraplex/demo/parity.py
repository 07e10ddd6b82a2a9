"""The demo base and its adapters against transformers and PEFT: same greedy tokens, same logits.

Twenty chat prompts, for the base and for each demo adapter; once each request alone in the engine, once all of them in
one mixed batch. The reference is transformers' cached greedy decoding in fp32 with the adapter active in PEFT; logits
are compared at every generated position. Run by ``make figures`` and, with fewer prompts, by the tests:

    python -m loraplex.demo.parity --prompts 20 --tokens 64
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from peft import PeftModel

from loraplex.core.adapter import AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.ids import Digest, RequestId, TenantName
from loraplex.core.model import ModelSpec
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.core.step import RowStart, StepPlan
from loraplex.demo import DEMO_ADAPTERS
from loraplex.demo.base import DEMO_BASE_ID, prepare_demo_base
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner import ExecutorBase, ExecutorConfig, build_executor
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.sampler import Sampler
from loraplex.registry.config import RegistryConfig
from loraplex.registry.intake import check_adapter
from loraplex.replica.driver import StepDriver

PROMPTS = (
    "What is the capital of Italy?",
    "Why do cats purr?",
    "How do I boil an egg?",
    "What is a rainbow?",
    "Who wrote Romeo and Juliet?",
    "Name a large ocean.",
    "What do bees make?",
    "Why is sleep important?",
    "How many legs does a spider have?",
    "What is gravity?",
    "Tell me about the moon.",
    "What is a volcano?",
    "How do plants grow?",
    "What is the fastest land animal?",
    "Why do leaves change colour in autumn?",
    "What is bread made of?",
    "Where do penguins live?",
    "What is a computer?",
    "How does rain form?",
    "What is the largest planet?",
)
_TENANT = TenantName("parity")


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model (the base or an adapter) with its reference."""

    model: str
    prompts: int
    tokens: int
    """Compared in each mode."""
    equal_alone: int
    """Prompts whose tokens are all equal, each request alone in the engine."""
    equal_mixed: int
    """The same, all requests of all models in one batch."""
    max_relative_logit_error: float
    """Largest |ours - theirs| over the largest |theirs| of the position, over both modes."""


class _Tap:
    """A sampler that keeps the logits that it is given, per slot, until someone takes them."""

    def __init__(self, model: ModelSpec, device: torch.device) -> None:
        self._sampler = Sampler(model, device)
        self.logits: dict[int, list[torch.Tensor]] = {}

    def start(self, start: RowStart) -> None:
        self.logits[start.slot] = []
        self._sampler.start(start)

    def release(self, slot: int) -> None:
        self._sampler.release(slot)

    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        for slot, logits_V in zip(slots, logits_BV, strict=True):
            self.logits[slot].append(logits_V.clone())
        return self._sampler.draw(logits_BV, slots, last_token=last_token)


class _Recorder:
    """An executor that remembers which request each slot was, so that the tap's logits find their request."""

    def __init__(self, inner: ExecutorBase, tap: _Tap) -> None:
        self._inner = inner
        self._tap = tap
        self.logits: dict[tuple[Digest | None, tuple[int, ...]], list[torch.Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def submit(self, plan: StepPlan) -> None:
        adapters = {row.slot: row.adapter for row in plan.rows}
        self._inner.submit(plan)
        for start in plan.starts:
            prompt = start.token_ids[: start.num_prompt_tokens]
            self.logits[adapters[start.slot], prompt] = self._tap.logits[start.slot]


class _Ours:
    """The demo base in our engine, its adapters staged."""

    def __init__(self, directory: Path) -> None:
        taps: list[_Tap] = []

        def tapped(model: ModelSpec, device: torch.device) -> _Tap:
            taps.append(_Tap(model, device))
            return taps[0]

        executor = build_executor(
            ExecutorConfig(dtype="float32", num_pages=900),
            model=str(directory),
            base_model_id=DEMO_BASE_ID,
            sampler=tapped,
        )
        self.recorder = _Recorder(executor, taps[0])
        self._engine = Engine(EngineConfig(prefix_cache=False), model=executor.model, arena=executor.arena)
        self._driver = StepDriver(self._engine, self.recorder, clock=SystemClock(), unstage=executor.unstage_adapter)
        self._count = 0
        self.adapters: dict[str, AdapterRef] = {}
        for demo in DEMO_ADAPTERS:
            manifest = check_adapter(
                demo.directory, bases={DEMO_BASE_ID: executor.model}, digest_salt="00" * 16, config=RegistryConfig()
            ).manifest
            executor.stage_adapter(manifest, str(demo.directory / "adapter_model.safetensors"))
            self._engine.adapter_staged(manifest.digest, executor.adapter_pages(manifest), 0.0)
            self.adapters[demo.name] = AdapterRef(tenant=_TENANT, name=demo.name, version=1, digest=manifest.digest)

    def generate(self, jobs: Sequence[tuple[str, list[int]]], max_tokens: int) -> list[list[int]]:
        """Greedy tokens of (model, prompt) pairs, all submitted at once."""
        tokens: dict[RequestId, list[int]] = {}
        for model, prompt in jobs:
            request_id = RequestId(f"r{self._count}")
            self._count += 1
            tokens[request_id] = []
            self._engine.add(
                EngineRequest(
                    request_id=request_id,
                    tenant=_TENANT,
                    base_model_id=DEMO_BASE_ID,
                    adapter=self.adapters.get(model),
                    prompt_token_ids=tuple(prompt),
                    sampling=SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True),
                    arrival_s=0.0,
                    cache_salt="parity",
                ),
                0.0,
            )
        while self._engine.num_unfinished:
            for output in self._driver.step().outputs:
                tokens[output.request_id] += [token.token_id for token in output.tokens]
        return list(tokens.values())

    def logits(self, model: str, prompt: list[int]) -> torch.Tensor:
        """(tokens, V) of the last run of this pair."""
        adapter = self.adapters.get(model)
        return torch.stack(self.recorder.logits[adapter.digest if adapter else None, tuple(prompt)])


class _Theirs:
    """transformers with PEFT, fp32."""

    def __init__(self, directory: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        first, *others = DEMO_ADAPTERS
        self._model: Any = PeftModel.from_pretrained(model, first.directory, adapter_name=first.name)
        for demo in others:
            self._model.load_adapter(demo.directory, adapter_name=demo.name)

    @torch.inference_mode()
    def generate(self, model: str, prompt: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the (tokens, V) logits that chose them."""
        if model != DEMO_BASE_ID:
            self._model.set_adapter(model)
        with self._model.disable_adapter() if model == DEMO_BASE_ID else nullcontext():
            ids, cache, tokens, logits = torch.tensor([prompt]), None, [], []
            for _ in range(max_tokens):
                out = self._model(ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits[0, -1].float())
                ids = logits[-1].argmax().reshape(1, 1)
                tokens.append(int(ids))
        return tokens, torch.stack(logits)


def run_parity(directory: Path, *, num_prompts: int, max_tokens: int) -> list[Agreement]:
    """``directory``: the demo base as a Hugging Face directory."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in PROMPTS[:num_prompts]
    ]
    models = [str(DEMO_BASE_ID), *(demo.name for demo in DEMO_ADAPTERS)]
    ours, theirs = _Ours(directory), _Theirs(directory)
    jobs = [(model, prompt) for model in models for prompt in prompts]
    expected = [theirs.generate(model, prompt, max_tokens) for model, prompt in jobs]
    alone = [ours.generate([job], max_tokens)[0] for job in jobs]
    errors = [_relative_error(ours.logits(*job), logits) for job, (_, logits) in zip(jobs, expected, strict=True)]
    mixed = ours.generate(jobs, max_tokens)
    errors_mixed = [_relative_error(ours.logits(*job), logits) for job, (_, logits) in zip(jobs, expected, strict=True)]
    agreements = []
    for model in models:
        own = [index for index, job in enumerate(jobs) if job[0] == model]
        agreements.append(
            Agreement(
                model=model,
                prompts=len(own),
                tokens=max_tokens * len(own),
                equal_alone=sum(alone[index] == expected[index][0] for index in own),
                equal_mixed=sum(mixed[index] == expected[index][0] for index in own),
                max_relative_logit_error=max(max(errors[index], errors_mixed[index]) for index in own),
            )
        )
    return agreements


def _relative_error(ours_TV: torch.Tensor, theirs_TV: torch.Tensor) -> float:
    """Largest over positions; after a first differing token the comparison would be meaningless and is infinite."""
    if ours_TV.shape != theirs_TV.shape:
        return float("inf")
    return float(((ours_TV - theirs_TV).abs().amax(1) / theirs_TV.abs().amax(1)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cache", type=Path, default=Path(".loraplex/models"))
    options = parser.parse_args()
    directory = prepare_demo_base(options.cache, lambda message: print(message, file=sys.stderr))
    agreements = run_parity(directory, num_prompts=options.prompts, max_tokens=options.tokens)
    print(json.dumps(msgspec.to_builtins(agreements), indent=2))


if __name__ == "__main__":
    main()
