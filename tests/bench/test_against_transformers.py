"""Tiny models on the CPU; on a GPU the command itself is run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loraplex.bench.against_transformers import Errors, ModelErrors, compare, within_limits, write_made_up
from loraplex.bench.reference import Reference
from loraplex.bench.tapped import Continuation, Prompt, TappedEngine
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.engine import EngineConfig
from loraplex.model_runner import ExecutorConfig, load_model_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["random:tiny-llama", "random:tiny-qwen2", "random:tiny-mistral"])
def test_equal_in_fp32(model: str) -> None:
    comparison = compare(model, num_prompts=2, num_tokens=6)
    assert comparison.holds
    assert comparison.ours.max < 2e-5
    assert comparison.ours.equal_argmax == 1
    assert comparison.theirs.max == 0
    # The prompts of all six models do not fit in one step.
    assert comparison.prompt_tokens > 2 * 256
    assert [errors.adapter for errors in comparison.models][:2] == [None, "rank-8-on-7"]
    assert len(comparison.models) == 6


def test_as_near_as_transformers_in_bf16() -> None:
    comparison = compare("random:tiny-llama", dtype="bfloat16", num_prompts=2, num_tokens=6)
    assert 1e-3 < comparison.theirs.median < comparison.theirs.max < 0.1
    assert comparison.ours.median < 1.25 * comparison.theirs.median
    for errors in comparison.models:
        assert 1e-3 < errors.ours.median <= errors.ours.max <= comparison.ours.max


def test_another_adapter_is_far_off(tmp_path: Path) -> None:
    spec = load_model_spec("random:tiny-llama", BaseModelId("base"))
    files = write_made_up(tmp_path, spec)
    (first, second), others = list(files)[:2], list(files)[2:]
    swapped = {first: files[second], second: files[first], **{name: files[name] for name in others}}
    prompts = [Prompt(adapter=name, token_ids=(3, 1, 4, 1, 5)) for name in (None, *files)]
    reference = Reference("random:tiny-llama", adapters=files, weights=torch.float32, device=CPU)
    expected = [reference.generate(prompt, 4) for prompt in prompts]
    engine = TappedEngine("random:tiny-llama", ExecutorConfig(), EngineConfig(), adapters=swapped)
    try:
        ours = engine.generate(prompts, 4, forced=[run.token_ids for run in expected])
    finally:
        engine.close()
    errors = {
        prompt.adapter: Errors.of([run], [other]).median
        for prompt, run, other in zip(prompts, ours, expected, strict=True)
    }
    assert min(errors[first], errors[second]) > 0.02
    assert max(errors[name] for name in (None, *others)) < 1e-5


def test_errors() -> None:
    reference = Continuation(token_ids=(0, 1), logits=torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    ours = Continuation(token_ids=(0, 1), logits=torch.tensor([[3.0, 4.5], [3.0, 2.0]]))
    errors = Errors.of([ours], [reference])
    assert (errors.median, errors.p95, errors.max) == (pytest.approx(0.8), pytest.approx(1.43), 1.5)
    assert errors.equal_argmax == 0.5


@pytest.mark.parametrize(
    ("ours", "other_median", "holds"),
    [
        ((1.2, 2.4, 7.9), 1.2, True),
        ((1.2, 2.4, 7.9), 1.3, False),
        ((1.2, 2.6, 7.9), 1.2, False),
        ((1.2, 2.4, 8.1), 1.2, False),
    ],
)
def test_limits(ours: tuple[float, float, float], other_median: float, holds: bool) -> None:
    def errors(median: float, p95: float, largest: float) -> Errors:
        return Errors(median=median, p95=p95, max=largest, equal_argmax=1.0)

    theirs = errors(1, 2, 2)
    models = [
        ModelErrors(adapter=None, ours=errors(*ours), theirs=theirs),
        ModelErrors(adapter="a", ours=errors(other_median, 0, 0), theirs=theirs),
    ]
    assert within_limits(models, errors(*ours), theirs, exact=False) is holds
    assert not within_limits(models, errors(*ours), theirs, exact=True)


def test_exit_status_and_what_is_wrong() -> None:
    command = [sys.executable, "-m", "loraplex.bench.against_transformers"]
    run = subprocess.run([*command, "random:tiny-qwen3", "--prompts", "1", "--tokens", "2"], capture_output=True)
    assert run.returncode == 0
    assert json.loads(run.stdout)["holds"]
    with pytest.raises(BadConfig, match="nosuch"):
        compare("random:nosuch")
