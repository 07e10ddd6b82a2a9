"""When a replica would be done with a request: a line through the cost model of its steps. Pure.

Two moments: the first token, after what is queued there and the prompt itself, and the pace of the tokens after it. The
functions take numbers alone, so that the fast simulator compiles them as they stand; ``Rates`` are their constants,
read off a cost profile here or off what replicas report in ``rates``. Called by ``policy``, ``router`` and
``simulator``.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from loraplex.core.plan import Shape
from loraplex.cost.step_cost import StepCoefficients, StepComposition, StepCost

_REFERENCE_TOKENS = (1024.0, 4096.0)
"""Steps with this many prompt tokens give the line; they are beyond the point from which each token costs time."""
LOAD_SHARE = 0.1
"""Of the wait for an adapter's load that counts less for each other request of the adapter: one waits, all use it."""
OUTPUT_SHARE = 0.02
"""Of a generation that ended in the mean length of generations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one base on one group: seconds of a step, term by term."""

    step_s: float
    """Of a step, however little it holds."""
    prefill_s: float = 0.0
    """More in a step with prompt tokens."""
    row_s: float = 0.0
    """More for each decoding request."""
    context_token_s: float = 0.0
    """More for each token of their contexts."""
    token_s: float = 0.0
    """More for each token of a prompt beyond ``free_tokens``."""
    free_tokens: float = 0.0
    """Tokens of a step, decoding ones too, that cost nothing beside the reading of the weights."""
    max_step_tokens: int = 2048
    max_running: int = 256

    @classmethod
    def of(cls, cost: StepCost, shape: Shape, *, max_step_tokens: int, max_running: int) -> Self:
        """The line through a cost model. Requests are taken to have adapters, whose own bytes are left out."""
        pace, through, stages = cost.interval, cost.latency, shape.pp
        low, high = (_prefill_s(pace, tokens) for tokens in _REFERENCE_TOKENS)
        token_s = (high - low) / (_REFERENCE_TOKENS[1] - _REFERENCE_TOKENS[0]) + pace.lora_token_s
        step_s = max(through.fixed_s, stages * pace.fixed_s) + max(through.lora_s, stages * pace.lora_s)
        beyond_s = low - pace.fixed_s - pace.prefill_s + pace.lora_token_s * _REFERENCE_TOKENS[0]
        return cls(
            step_s=step_s,
            prefill_s=max(through.prefill_s, stages * pace.prefill_s),
            row_s=pace.row_s + pace.token_slopes[0] + pace.lora_token_s,
            context_token_s=pace.kv_token_s,
            token_s=token_s,
            free_tokens=max(0.0, stages * (_REFERENCE_TOKENS[0] - beyond_s / token_s)),
            max_step_tokens=max_step_tokens,
            max_running=max_running,
        )


def decode_step_s(step_s: float, row_s: float, context_token_s: float, rows: float, context_tokens: float) -> float:
    """A step in which ``rows`` requests decode, whose contexts are ``context_tokens`` together."""
    return step_s + row_s * rows + context_token_s * context_tokens


def first_token_s(
    decode_s: float,
    prefill_s: float,
    token_s: float,
    free_tokens: float,
    max_step_tokens: float,
    max_running: float,
    rows: float,
    queued_tokens: float,
    context_tokens: float,
    room_tokens: float,
    new_tokens: float,
    output_tokens: float,
) -> float:
    """Until a request that comes now has its first token.

    ``rows`` requests are there and steps take ``decode_s`` without prompts; ``queued_tokens`` prompt tokens are to be
    computed before its own ``new_tokens``; the pages that are free or reclaimable hold ``room_tokens``; a request
    generates ``output_tokens`` on average.
    """
    # A gateway calls this for each replica: comparisons are cheaper there than ``min`` and ``max``.
    tokens = queued_tokens + new_tokens
    running = rows if rows < max_running else max_running
    steps = tokens / (max_step_tokens - running) if running < max_step_tokens else tokens
    if steps < 1.0:
        steps = 1.0
    seconds = steps * (decode_s + prefill_s)
    beyond = tokens + steps * (running - free_tokens)
    if beyond > 0.0:
        seconds += token_s * beyond
    if rows > 0.0:
        # The step under way.
        seconds += 0.5 * decode_s
    waiting_s = 0.0
    if rows >= max_running:
        # A place is free whenever one of the running ends.
        waiting_s = (rows + 1.0 - max_running) * output_tokens * decode_s / max_running
    missing = tokens - room_tokens
    if missing > 0.0 and context_tokens > 0.0:
        # They give back their contexts within a life.
        missing_s = missing * output_tokens * decode_s / context_tokens
        if missing_s > waiting_s:
            waiting_s = missing_s
    return seconds + waiting_s


class OutputLength:
    """How many tokens a generation is expected to have: a running mean of those that ended."""

    def __init__(self, expected_tokens: float) -> None:
        """``expected_tokens``: until some have ended."""
        self.expected = expected_tokens

    def ended(self, num_tokens: int) -> None:
        """A generation ended after so many tokens. Changes state."""
        self.expected += OUTPUT_SHARE * (num_tokens - self.expected)


def _prefill_s(coefficients: StepCoefficients, tokens: float) -> float:
    """A step with one prompt of 512 tokens after another, ``tokens`` in all."""
    rows = tokens / 512.0
    pairs = rows * 512.0 * 513.0 / 2.0
    steps = StepComposition.of(prefill_rows=rows, prefill_tokens=tokens, prefill_pairs=pairs)
    return float(np.asarray(coefficients.seconds(steps))[0])
