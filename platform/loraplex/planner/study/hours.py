"""Two hours of LLM requests made from Azure's functions and ServeGen's clients: one to plan on, the next to judge by.

No public trace has real adapter identities: adapter i plays one function's invocations per minute, shifted by a
multiple of ``Recipe.shift_minutes``, so that 467 functions stand for 2,000 adapters, and has one client's lengths.
Called by ``study``.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.simulator.types import AdapterSize
from loraplex.traces.arrivals import AdapterName, Arrivals
from loraplex.traces.convert.counts import CountSpreader, Spread, count_table
from loraplex.traces.names import NameTable, column_indices
from loraplex.traces.synth.lengths import LengthSampler, Limits, parse_lengths

LEFT_OUT = 9
"""The hottest functions, which have nine tenths of all invocations, are left out, as in ``maf2019_500_requests``."""
CV = 4.0
"""Of the gaps of an adapter within a minute, as AlpaServe replays these functions."""
RANKS = (8, 16, 32, 64)
LIMITS = Limits(max_prompt_tokens=7168, max_output_tokens=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTraffic:
    base: BaseModelId
    num_adapters: int
    pool: str
    """Of ServeGen's clients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    traffic: tuple[BaseTraffic, ...] = (
        BaseTraffic(base=BaseModelId("llama3-8b"), num_adapters=1400, pool="m-mid"),
        BaseTraffic(base=BaseModelId("llama3-70b"), num_adapters=600, pool="m-large"),
    )
    scale: float = 1.0
    """Multiplies the invocations."""
    cv: float = CV
    minutes: int = 60
    """Of each of the two windows."""
    shift_minutes: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Both windows start at second 0 and have the same tables of names."""

    planning: Arrivals
    following: Arrivals
    sizes: tuple[AdapterSize, ...]
    """Of the adapters, in the order of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """Invocations per minute."""

    counts: npt.NDArray[np.float64]
    """[functions, minutes], functions by name."""
    owners: tuple[str, ...]
    """[functions]"""

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, left_out: int = LEFT_OUT) -> "Functions":
        """A Parquet file of function, minute, count and owner. InvalidInput naming the file."""
        try:
            table = pq.read_table(path, columns=["function", "minute", "count", "owner"])
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidInput(f"{os.fspath(path)}: expected function, minute, count, owner: {reason}") from error
        names = np.array(table.column("function").to_pylist())
        functions, first, row = np.unique(names, return_index=True, return_inverse=True)
        minutes = table.column("minute").to_numpy().astype(np.int64)
        counts = np.zeros((len(functions), int(minutes.max()) + 1))
        np.add.at(counts, (row, minutes), table.column("count").to_numpy())
        owners = np.array(table.column("owner").to_pylist())[first]
        kept = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[left_out:])
        return cls(counts=counts[kept], owners=tuple(owners[kept].tolist()))


def build(functions: Functions, lengths: str | os.PathLike[str], recipe: Recipe) -> Hours:
    """InvalidInput when the functions' record is too short for the adapters; errors of ``lengths`` as
    ``parse_lengths``."""
    names, sizes, counts = _adapters(functions, recipe)
    samplers = [
        parse_lengths(f"servegen:{os.fspath(lengths)}#{one.pool}", seed=recipe.seed + index, limits=LIMITS)
        for index, one in enumerate(recipe.traffic)
    ]
    windows = [_window(names, counts, samplers, recipe, first_minute=first) for first in (0, recipe.minutes)]
    return Hours(planning=windows[0], following=windows[1], sizes=sizes)


def _adapters(
    functions: Functions, recipe: Recipe
) -> tuple[tuple[AdapterName, ...], tuple[AdapterSize, ...], npt.NDArray[np.float64]]:
    """Names, sizes and invocations per minute [adapters, minutes]."""
    num_functions, num_minutes = functions.counts.shape
    shifts = [-(-one.num_adapters // num_functions) for one in recipe.traffic]
    if sum(shifts) * recipe.shift_minutes > num_minutes or 2 * recipe.minutes > num_minutes:
        raise InvalidInput(
            f"{num_functions} functions over {num_minutes} minutes cannot play "
            f"{sum(one.num_adapters for one in recipe.traffic)} adapters for two windows of {recipe.minutes} minutes, "
            f"shifted by {recipe.shift_minutes}"
        )
    names: list[AdapterName] = []
    rows = []
    for index, one in enumerate(recipe.traffic):
        for adapter in range(one.num_adapters):
            shift, function = divmod(adapter, num_functions)
            names.append(AdapterName(functions.owners[function], one.base, f"{one.base}-{adapter:04d}"))
            rows.append(np.roll(functions.counts[function], -recipe.shift_minutes * (shift + sum(shifts[:index]))))
    ranks = np.random.default_rng(0).choice(RANKS, size=len(names))
    return tuple(names), tuple(AdapterSize(lora_rank=int(rank)) for rank in ranks), np.array(rows)


def _window(
    names: tuple[AdapterName, ...],
    counts: npt.NDArray[np.float64],
    samplers: list[LengthSampler],
    recipe: Recipe,
    *,
    first_minute: int,
) -> Arrivals:
    """``counts`` [adapters, minutes]."""
    labels = pa.array([name.name for name in names])
    table = NameTable[str]()
    for name in names:
        table.index_of(name.name)

    def counted() -> Iterator[pa.Table]:
        for minute in range(first_minute, first_minute + recipe.minutes):
            adapters = np.flatnonzero(counts[:, minute]).astype(np.int32)
            if not len(adapters):
                continue
            yield count_table(
                {
                    "arrival_s": pa.array(np.full(len(adapters), 60.0 * minute)),
                    "adapter_name": pa.DictionaryArray.from_arrays(pa.array(adapters), labels),
                    "count": pa.array(counts[adapters, minute].astype(np.int64)),
                },
                where="functions",
            )

    spreader = CountSpreader(interval_s=60.0, spread=Spread.GAMMA, cv=recipe.cv, scale=recipe.scale, seed=recipe.seed)
    made = list(spreader.requests(counted()))
    adapter = np.concatenate([column_indices(part.column("adapter_name"), table) for part in made])
    arrival_s = np.concatenate([part.column("arrival_s").to_numpy() for part in made]) - 60.0 * first_minute
    base_of = np.repeat(np.arange(len(recipe.traffic)), [one.num_adapters for one in recipe.traffic]).astype(np.int32)
    base = base_of[adapter]
    prompt, output = np.zeros(len(adapter), dtype=np.int32), np.zeros(len(adapter), dtype=np.int32)
    for index, sampler in enumerate(samplers):
        chosen = np.flatnonzero(base == index)
        prompt[chosen], output[chosen] = sampler.draw(adapter[chosen])
    tenants = NameTable[str]()
    tenant_of = np.array([tenants.index_of(name.tenant or "") for name in names], dtype=np.int32)
    return Arrivals(
        origin_s=60.0 * first_minute,
        arrival_s=arrival_s,
        adapter=adapter,
        base_model=base,
        tenant=tenant_of[adapter],
        prompt_tokens=prompt,
        output_tokens=output,
        adapters=names,
        base_models=tuple(one.base for one in recipe.traffic),
        tenants=tenants.names,
    )
