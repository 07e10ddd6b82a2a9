"""Prompt and output lengths: fixed, lognormal, drawn from a trace, or from ServeGen's quantiles per client.

Owns the text form (``parse_lengths``). The same rows get the same lengths however they are cut into chunks. Called by
synthesis and by conversion, for traces that do not tell lengths.
"""

import math
import os
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from loraplex.core.errors import BadConfig, InvalidInput, NotFound
from loraplex.traces.reader import read_traces

FORMS = "fixed:PROMPT,OUTPUT | lognormal:MEAN,CV,MEAN,CV | trace:PATH | servegen:PATH[#POOL]"
_SAMPLE_ROWS = 1 << 17
_MAX_TOKENS = 2**31 - 1
_Ints = npt.NDArray[np.int32]
_Floats = npt.NDArray[np.float64]


class Limits(NamedTuple):
    """Longer ones are cut; the shortest is 1."""

    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None


class LengthSampler(Protocol):
    def draw(self, adapter: _Ints) -> tuple[_Ints, _Ints]:
        """(prompt tokens, output tokens) of the next requests, which are for these adapters. All [N] int32."""
        ...


def parse_lengths(text: str, *, seed: int, limits: Limits) -> LengthSampler:
    """Raises BadConfig naming ``text``; errors of a file as ``read_traces``."""
    kind, _, rest = text.partition(":")
    if kind == "trace" and rest:
        return _Empirical(rest, seed, limits)
    if kind == "servegen" and rest:
        path, _, pool = rest.partition("#")
        return _Quantiles(path, pool or None, seed, limits)
    try:
        numbers = [float(part) for part in rest.split(",")]
    except ValueError:
        numbers = []
    if not all(number > 0 and math.isfinite(number) for number in numbers):
        numbers = []
    if kind == "fixed" and len(numbers) == 2:
        return _Lognormal(numbers[0], 0.0, numbers[1], 0.0, seed, limits)
    if kind == "lognormal" and len(numbers) == 4:
        prompt, prompt_cv, output, output_cv = numbers
        return _Lognormal(prompt, prompt_cv, output, output_cv, seed, limits)
    raise BadConfig(f"lengths {text!r}, expected {FORMS}, with numbers greater than 0", param="lengths")


def _streams(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Two, so that prompts and outputs do not depend on how the requests are cut into chunks."""
    return np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3])


def _tokens(values: _Floats, limit: int | None) -> _Ints:
    return np.clip(np.rint(values), 1, _MAX_TOKENS if limit is None else limit).astype(np.int32)


class _Lognormal:
    """Independent lognormals, given by mean and coefficient of variation; CV 0 is a fixed length."""

    def __init__(
        self, prompt: float, prompt_cv: float, output: float, output_cv: float, seed: int, limits: Limits
    ) -> None:
        self._streams = _streams(seed)
        self._limits = limits
        sigmas = [math.sqrt(math.log1p(cv**2)) for cv in (prompt_cv, output_cv)]
        means = (math.log(prompt) - sigmas[0] ** 2 / 2, math.log(output) - sigmas[1] ** 2 / 2)
        self._parameters = tuple(zip(means, sigmas, strict=True))

    def draw(self, adapter: _Ints) -> tuple[_Ints, _Ints]:
        drawn = [
            np.exp(mean + sigma * stream.standard_normal(len(adapter)))
            for stream, (mean, sigma) in zip(self._streams, self._parameters, strict=True)
        ]
        return _tokens(drawn[0], self._limits.max_prompt_tokens), _tokens(drawn[1], self._limits.max_output_tokens)


class _Empirical:
    """(prompt, output) pairs of a trace, drawn with replacement from at most 131,072 of its rows, evenly chosen."""

    def __init__(self, path: str, seed: int, limits: Limits) -> None:
        """Raises InvalidInput when no row has both lengths."""
        self._stream = _streams(seed)[0]
        self._limits = limits
        self._pairs = _sample_pairs(path)
        if not len(self._pairs):
            raise InvalidInput(f"trace {path}: no row has prompt_tokens and output_tokens", code="invalid_trace")

    def draw(self, adapter: _Ints) -> tuple[_Ints, _Ints]:
        rows = (self._stream.random(len(adapter)) * len(self._pairs)).astype(np.int64)
        pairs = self._pairs[rows].astype(np.float64)
        return (
            _tokens(pairs[:, 0], self._limits.max_prompt_tokens),
            _tokens(pairs[:, 1], self._limits.max_output_tokens),
        )


def _sample_pairs(path: str) -> npt.NDArray[np.int32]:
    """[N, 2] int32: every k-th row that has both lengths, k doubled whenever too many are held."""
    held: list[npt.NDArray[np.int32]] = []
    num_held = seen = 0
    step = 1
    for table in read_traces(path, columns=("prompt_tokens", "output_tokens")):
        table = table.select(["prompt_tokens", "output_tokens"]).drop_null()
        pairs = np.stack([table.column(name).to_numpy() for name in table.column_names], axis=1)
        held.append(pairs[-seen % step :: step])
        seen += len(pairs)
        num_held += len(held[-1])
        while num_held > _SAMPLE_ROWS:
            held = [np.concatenate(held)[::2]]
            num_held = len(held[0])
            step *= 2
    return np.concatenate(held) if held else np.empty((0, 2), dtype=np.int32)


class _Quantiles:
    """ServeGen's published clients: adapter i has the lengths of client i mod C, by the inverse of its quantiles."""

    def __init__(self, path: str, pool: str | None, seed: int, limits: Limits) -> None:
        self._streams = _streams(seed)
        self._limits = limits
        self._prompt, self._output = _read_quantiles(path, pool)

    def draw(self, adapter: _Ints) -> tuple[_Ints, _Ints]:
        client = adapter % len(self._prompt)
        return (
            _tokens(_inverse(self._prompt, client, self._streams[0]), self._limits.max_prompt_tokens),
            _tokens(_inverse(self._output, client, self._streams[1]), self._limits.max_output_tokens),
        )


def _inverse(quantiles_CQ: _Floats, client: _Ints, stream: np.random.Generator) -> _Floats:
    at = stream.random(len(client)) * (quantiles_CQ.shape[1] - 1)
    below = at.astype(np.int64)
    low, high = quantiles_CQ[client, below], quantiles_CQ[client, below + 1]
    lengths: _Floats = low + (at - below) * (high - low)
    return lengths


def _read_quantiles(path: str, pool: str | None) -> tuple[_Floats, _Floats]:
    """(prompt, output) of the clients that have both, [C clients, Q quantiles] float64 each."""
    if not os.path.isfile(path):
        raise NotFound(f"no file of length quantiles at {path}")
    try:
        table = pq.read_table(path, columns=["pool", "client", "field", "quantiles"])
        rows = table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(f"{path}: expected columns pool, client, field, quantiles: {reason}") from error
    pools = sorted({row["pool"] for row in rows})
    if pool is not None and pool not in pools:
        raise BadConfig(f"{path} has no pool {pool!r}, only {', '.join(pools)}", param="lengths")
    found = {
        (row["pool"], row["client"], row["field"]): row["quantiles"]
        for row in rows
        if pool is None or row["pool"] == pool
    }
    clients = sorted({key[:2] for key in found})
    both = [key for key in clients if {(*key, "prompt"), (*key, "output")} <= found.keys()]
    if not both or len({len(values) for values in found.values()}) != 1:
        raise InvalidInput(f"{path}: needs prompt and output quantiles of a client, all of one length")
    prompt, output = (
        np.array([found[(*key, field)] for key in both], dtype=np.float64) for field in ("prompt", "output")
    )
    return prompt, output
