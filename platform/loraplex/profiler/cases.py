"""Which loads a profile is measured on: a grid to fit, and random mixtures to check the fit with. Pure.

Requests of a case have lengths of their own and come as others end, so that its steps hold prefill chunks and decode
rows in many proportions, while its contexts grow. Called by ``measure``.
"""

from dataclasses import dataclass

import numpy as np

_CASE_TOKENS = 1 << 17
"""Of about so many a case has no more requests than run at a time: one of many long prompts ends in seconds."""
_LONE_PROMPTS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileCase:
    concurrency: int
    """Unfinished requests at a time."""
    input_tokens: tuple[int, ...]
    """Of each request."""
    output_tokens: tuple[int, ...]
    adapters: tuple[int, ...]
    """Of each request, an index into the profile's adapters, or -1."""

    @property
    def num_tokens(self) -> int:
        return sum(self.input_tokens) + sum(self.output_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_running: int
    max_request_tokens: int
    """Of prompt and output: by the base's context."""
    max_kv_tokens: int
    """Of all unfinished requests, so that none is preempted."""
    num_adapters: int


def grid(limits: Limits, *, seed: int = 0) -> tuple[ProfileCase, ...]:
    """Concurrencies x prompt lengths x (no adapter, one, half of the requests with several, each with its own)."""
    random = np.random.default_rng(seed)
    cases = []
    for concurrency in _concurrencies(limits.max_running):
        for longest in (32, 256, 2048):
            kinds = [0, 1, -(-concurrency // 4), concurrency] if longest == 256 else [0, concurrency]
            for kind in dict.fromkeys(min(kind, limits.num_adapters) for kind in kinds):
                case = _draw(
                    random,
                    limits,
                    concurrency=concurrency,
                    longest_input=longest,
                    longest_output=48,
                    num_adapters=kind,
                    base_share=0.5 if 1 < kind < concurrency else 0.0,
                )
                cases.append(case)
    # Long contexts, read by few rows.
    for concurrency in (1, 4):
        cases.append(
            _draw(
                random,
                limits,
                concurrency=concurrency,
                longest_input=8192,
                longest_output=64,
                num_adapters=0,
                base_share=1.0,
            )
        )
    return tuple(dict.fromkeys(cases))


def lone_prompts(limits: Limits, *, seed: int = 0) -> ProfileCase:
    """One request at a time, of long prompts: for what a pipeline's stages take for steps that are alone in it."""
    return _draw(
        np.random.default_rng(seed),
        limits,
        concurrency=1,
        longest_input=2048,
        longest_output=2,
        num_adapters=0,
        base_share=1.0,
        fewest=_LONE_PROMPTS,
    )


def held_out(limits: Limits, *, count: int = 6, seed: int = 1) -> tuple[ProfileCase, ...]:
    """Everything drawn anew: concurrency, lengths, number of adapters and share of base requests."""
    random = np.random.default_rng(seed)
    return tuple(
        _draw(
            random,
            limits,
            concurrency=_between(random, 1, limits.max_running),
            longest_input=_between(random, 16, 2048),
            longest_output=_between(random, 16, 128),
            num_adapters=int(random.integers(0, limits.num_adapters + 1)),
            base_share=float(random.uniform(0.0, 0.7)),
        )
        for _ in range(count)
    )


def _draw(
    random: np.random.Generator,
    limits: Limits,
    *,
    concurrency: int,
    longest_input: int,
    longest_output: int,
    num_adapters: int,
    base_share: float,
    fewest: int = 4,
) -> ProfileCase:
    longest_output = max(2, min(longest_output, limits.max_request_tokens // 4))
    longest_input = max(2, min(longest_input, limits.max_request_tokens - longest_output))
    # As many at a time as their KV has room for, shorter ones where even two have none.
    room = limits.max_kv_tokens // (longest_input + longest_output)
    concurrency = max(1, min(concurrency, limits.max_running, room))
    longest_input = max(2, min(longest_input, limits.max_kv_tokens // concurrency - longest_output))
    mean_tokens = 5 * (longest_input + longest_output) // 8
    count = max(fewest, concurrency, min(2 * concurrency, _CASE_TOKENS // mean_tokens))
    inputs = random.integers(max(1, longest_input // 4), longest_input + 1, size=count)
    outputs = random.integers(max(1, longest_output // 4), longest_output + 1, size=count)
    adapters = np.full(count, -1)
    if num_adapters:
        adapters = random.permutation(np.arange(count) % num_adapters)
        adapters[random.random(count) < base_share] = -1
    return ProfileCase(
        concurrency=concurrency,
        input_tokens=tuple(inputs.tolist()),
        output_tokens=tuple(outputs.tolist()),
        adapters=tuple(adapters.tolist()),
    )


def _concurrencies(most: int) -> list[int]:
    """1, 4, 16, ... and ``most``; between the last two their geometric mean."""
    powers = [4**i for i in range(12) if 4**i < most]
    return sorted({*powers, most, round((powers[-1] * most) ** 0.5) if powers else most})


def _between(random: np.random.Generator, least: int, most: int) -> int:
    """Log-uniform."""
    return int(np.exp(random.uniform(np.log(least), np.log(max(least, most)))).round())
