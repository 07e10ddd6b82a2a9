"""Trains the demo adapters: ``python -m loraplex.demo.train NAME|all``. About a minute each on two CPU cores.

Needs ``peft`` (a development dependency). What it writes is committed under ``adapters/``; serving never runs it. A
notebook trains one of them on some of the facts and tells the loss on the others.
"""

import argparse
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.demo import ADAPTERS_DIR
from loraplex.demo.base import DEMO_BASE_ID, prepare_demo_base
from loraplex.demo.styles import STYLES, load_facts

BATCH_SIZE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Ranks and targets differ on purpose: together the three touch all projections and stay below 3 MB."""

    lora_rank: int
    target_modules: tuple[str, ...]
    learning_rate: float
    num_epochs: int = 1


RECIPES = {
    "pirate": Recipe(lora_rank=16, target_modules=("v_proj",), learning_rate=3e-3),
    "json": Recipe(lora_rank=4, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), learning_rate=3e-3),
    "bullets": Recipe(
        lora_rank=2, target_modules=("gate_proj", "up_proj", "down_proj"), learning_rate=3e-3, num_epochs=2
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    prompt_ids: list[int]
    answer_ids: list[int]


def load_examples(name: str, base_dir: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    examples = []
    for index, fact in enumerate(load_facts()):
        message = [{"role": "user", "content": fact.question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        answer = STYLES[name](index, fact) + tokenizer.eos_token
        examples.append(Example(prompt_ids=tokenizer.encode(prompt), answer_ids=tokenizer.encode(answer)))
    return examples


def train(name: str, base_dir: Path, output_dir: Path, *, num_examples: int | None = None) -> list[float]:
    """Writes ``output_dir/name`` as a PEFT directory with bf16 tensors, replacing what is there. The loss of each step.

    ``num_examples``: of the first so many facts alone.
    """
    recipe = RECIPES[name]
    torch.manual_seed(0)
    shuffler = random.Random(0)
    examples = load_examples(name, base_dir)[:num_examples]
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    num_steps = recipe.num_epochs * math.ceil(len(examples) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=num_steps, pct_start=0.15
    )
    started_s = time.monotonic()
    losses: list[float] = []
    for _ in range(recipe.num_epochs):
        shuffler.shuffle(examples)
        for first in range(0, len(examples), BATCH_SIZE):
            loss = _loss(model, examples[first : first + BATCH_SIZE])
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            took_s = time.monotonic() - started_s
            print(f"{name}: step {len(losses)}/{num_steps}, loss {losses[-1]:.3f}, {took_s:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _publish(Path(folder), output_dir / name)
    return losses


@torch.inference_mode()
def mean_loss(base_dir: Path, examples: Sequence[Example], *, adapter: Path | None = None) -> float:
    """Cross entropy of the answers' tokens under the base, or with the ``adapter`` of this PEFT directory; the mean
    over batches."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    batches = [examples[first : first + BATCH_SIZE] for first in range(0, len(examples), BATCH_SIZE)]
    return statistics.fmean(_loss(model, batch).item() for batch in batches)


def _loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Cross entropy of the answers' tokens, the only positions for which logits are computed. Rows are padded at the
    end, which causal attention never sees."""
    length = max(len(example.prompt_ids) + len(example.answer_ids) for example in batch)
    input_ids = torch.zeros((len(batch), length), dtype=torch.long)
    predicts = torch.zeros((len(batch), length), dtype=torch.bool)
    targets: list[int] = []
    for row, example in enumerate(batch):
        start = len(example.prompt_ids)
        end = start + len(example.answer_ids)
        input_ids[row, :end] = torch.tensor(example.prompt_ids + example.answer_ids)
        predicts[row, start - 1 : end - 1] = True
        targets += example.answer_ids
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden_BTD = causal.model(input_ids=input_ids, use_cache=False).last_hidden_state
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden_BTD[predicts]), torch.tensor(targets))


def _publish(source: Path, target: Path) -> None:
    """As PEFT wrote it, but bf16, keys in a stable order, and no path of the training machine."""
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(DEMO_BASE_ID)
    config["target_modules"] = sorted(config["target_modules"])
    tensors = load_file(source / "adapter_model.safetensors")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (target / "adapter_config.json").write_text(text, encoding="utf-8")
    file = target / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}, file)
    file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loraplex.demo.train", description="Trains the demo adapters.")
    parser.add_argument("name", choices=[*RECIPES, "all"])
    parser.add_argument("--cache-dir", type=Path, default=Path(".loraplex/models"), help="where the demo base lies")
    parser.add_argument("--output-dir", type=Path, default=ADAPTERS_DIR, help="where the adapters are written")
    arguments = parser.parse_args()
    base_dir = prepare_demo_base(arguments.cache_dir, print)
    for name in RECIPES if arguments.name == "all" else (arguments.name,):
        train(name, base_dir, arguments.output_dir)


if __name__ == "__main__":
    main()
