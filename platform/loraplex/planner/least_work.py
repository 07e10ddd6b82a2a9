"""The least time of a group that a request can take, however it is batched with others. Called by ``bound``.

A step of N tokens takes at least c + m N seconds for every line below its time over N, and there are at least as many
steps as all decode tokens over ``max_running``; so a token of a prompt costs m, one of an answer m + c / max_running,
beside what its attention and its adapter cost alone. Shared adapter reads, prompts cut in chunks and idle stages are
left out: they only add.
"""

from dataclasses import dataclass

import numpy as np

from loraplex.cost.step_cost import StepCoefficients, StepComposition
from loraplex.engine import EngineConfig
from loraplex.simulator.types import FloatArray, ReplicaCost

_POINTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastWork:
    """Seconds of the whole group. Arrays [Q], of requests of so many tokens."""

    prompt_s: FloatArray
    """Until the first token."""
    answer_s: FloatArray
    """The other tokens."""
    alone_s: FloatArray
    """Until the first token on an idle group."""


def least_work(
    cost: ReplicaCost,
    engine: EngineConfig,
    num_stages: int,
    prompt: FloatArray,
    output: FloatArray,
    *,
    with_adapter: bool,
) -> LeastWork:
    """``prompt``, ``output`` [Q] tokens; the line is the one that makes these requests cost most."""
    of = cost.step.interval
    lora_s = of.lora_token_s if with_adapter else 0.0
    answers = output - 1
    pairs = prompt * (prompt - 1) / 2
    prompt_s = of.pair_s * pairs + of.kv_token_s * prompt + lora_s * prompt
    answer_s = (of.row_s + lora_s) * answers + of.kv_token_s * (answers * prompt + answers * (answers + 1) / 2)
    best: tuple[float, FloatArray, FloatArray] | None = None
    for fixed_s, token_s in _lines(of, num_stages, engine.max_step_tokens):
        both = prompt_s + token_s * prompt, answer_s + (token_s + fixed_s / engine.max_running) * answers
        total = float((both[0] + both[1]).sum())
        if best is None or total > best[0]:
            best = total, *both
    assert best is not None
    return LeastWork(prompt_s=best[1], answer_s=best[2], alone_s=_alone_s(cost, engine, num_stages, prompt))


def _lines(of: StepCoefficients, num_stages: int, max_tokens: int) -> list[tuple[float, float]]:
    """(c, m): c + m N is at most the time of any step of N tokens, cut into 1 to ``num_stages`` micro-batches."""
    tokens = np.unique(np.concatenate([np.geomspace(1, max_tokens, _POINTS), np.clip(of.token_knots, 1, max_tokens)]))
    seconds = np.min(
        [
            parts * of.seconds(StepComposition.of(decode_rows=tokens / parts)) - of.row_s * tokens
            for parts in range(1, num_stages + 1)
        ],
        axis=0,
    )
    # Between two points the time is at least that of the first: lines stay under the steps so formed.
    slopes = np.unique(np.maximum(np.diff(seconds) / np.diff(tokens), 0.0))
    found = [(0.0, float(np.min(np.append(seconds[:-1] / tokens[1:], seconds[-1] / tokens[-1]))))]
    for slope in slopes.tolist():
        fixed = float(np.min(np.append(seconds[:-1] - slope * tokens[1:], seconds[-1] - slope * tokens[-1])))
        if fixed >= 0:
            found.append((fixed, slope))
    return found


def _alone_s(cost: ReplicaCost, engine: EngineConfig, num_stages: int, prompt: FloatArray) -> FloatArray:
    """[Q] the prompt in chunks, each a stage's share of ``max_step_tokens``, one behind the other through the stages;
    attention left out."""
    chunk = -(-engine.max_step_tokens // num_stages)
    full, rest = np.divmod(prompt, chunk)
    step = StepComposition.of(prefill_rows=1.0, prefill_tokens=float(chunk))
    whole = float(cost.step.latency_s(step)[0])
    pace = float(cost.step.interval_s(step)[0]) if num_stages > 1 else whole
    last = cost.step.latency_s(StepComposition.of(prefill_rows=1.0, prefill_tokens=np.maximum(rest, 1.0)))
    return np.asarray(full * pace + np.where(rest > 0, last, whole - pace), dtype=np.float64)
