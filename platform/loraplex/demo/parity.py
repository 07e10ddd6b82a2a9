"""The demo base and its adapters against transformers and PEFT: same greedy tokens, same logits.

Twenty chat prompts, for the base and for each demo adapter; once each request alone in the engine, once all of them in
one mixed batch. The reference is transformers' cached greedy decoding in fp32 with the adapter active in PEFT; logits
are compared at every generated position. Run by ``make figures`` and, with fewer prompts, by the tests:

    python -m loraplex.demo.parity --prompts 20 --tokens 64
"""

import argparse
import json
import sys
from pathlib import Path

import msgspec
import torch
import transformers

from loraplex.bench.reference import Reference
from loraplex.bench.tapped import Continuation, Prompt, TappedEngine
from loraplex.demo import DEMO_ADAPTERS
from loraplex.demo.base import DEMO_BASE_ID, prepare_demo_base
from loraplex.engine import EngineConfig
from loraplex.model_runner import ExecutorConfig

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


def run_parity(directory: Path, *, num_prompts: int, max_tokens: int) -> list[Agreement]:
    """``directory``: the demo base as a Hugging Face directory."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in PROMPTS[:num_prompts]
    ]
    adapters = {demo.name: demo.directory for demo in DEMO_ADAPTERS}
    models = [None, *adapters]
    ours = TappedEngine(
        str(directory),
        ExecutorConfig(dtype="float32", num_pages=900),
        EngineConfig(prefix_cache=False),
        adapters=adapters,
    )
    theirs = Reference(str(directory), adapters=adapters, weights=torch.float32, device=torch.device("cpu"))
    jobs = [Prompt(adapter=model, token_ids=tuple(prompt)) for model in models for prompt in prompts]
    expected = [theirs.generate(job, max_tokens) for job in jobs]
    alone = [ours.generate([job], max_tokens)[0] for job in jobs]
    mixed = ours.generate(jobs, max_tokens)
    ours.close()
    agreements = []
    for model in models:
        own = [index for index, job in enumerate(jobs) if job.adapter == model]
        agreements.append(
            Agreement(
                model=model or str(DEMO_BASE_ID),
                prompts=len(own),
                tokens=max_tokens * len(own),
                equal_alone=sum(alone[index].token_ids == expected[index].token_ids for index in own),
                equal_mixed=sum(mixed[index].token_ids == expected[index].token_ids for index in own),
                max_relative_logit_error=max(
                    _relative_error(run[index], expected[index]) for run in (alone, mixed) for index in own
                ),
            )
        )
    return agreements


def _relative_error(ours: Continuation, theirs: Continuation) -> float:
    """Largest over positions; after a first differing token the comparison would be meaningless and is infinite."""
    if ours.token_ids != theirs.token_ids:
        return float("inf")
    difference_T = (ours.logits - theirs.logits).abs().amax(1)
    return float((difference_T / theirs.logits.abs().amax(1)).max())


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
