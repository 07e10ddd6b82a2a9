"""A recipe's trace as a stream of tables, in arrival order, in memory that does not grow with its length."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loraplex.traces.schema import trace_table
from loraplex.traces.synth.lengths import Limits, parse_lengths
from loraplex.traces.synth.modulation import Modulation
from loraplex.traces.synth.popularity import adapter_rates, deal_out, power_weights
from loraplex.traces.synth.process import AdapterArrivals
from loraplex.traces.synth.recipe import Recipe

_SLAB_ROWS = 1 << 17
"""Expected rows of one slab of time, the unit in which the adapters' arrivals are merged ..."""
_SLAB_ROWS_PER_ADAPTER = 32
"""... and at least so many for each adapter, so that each slab is worth its cost."""


def generate(recipe: Recipe) -> Iterator[pa.Table]:
    """Tables in TRACE_SCHEMA. Rows that arrive at the same time are in order of their adapters.

    Raises BadConfig and the errors of a lengths file before the first table.
    """
    limits = Limits(recipe.max_prompt_tokens, recipe.max_output_tokens)
    lengths = parse_lengths(recipe.lengths, seed=recipe.seed, limits=limits)
    labels = _Labels(recipe)
    left = recipe.requests
    for arrival_s, adapter in _merged(recipe):
        arrival_s, adapter = arrival_s[:left], adapter[:left]
        if len(adapter):
            yield labels.table(arrival_s, adapter, *lengths.draw(adapter))
        if left is not None:
            left -= len(adapter)
            if not left:
                return


def _merged(recipe: Recipe) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]]:
    """(arrival_s, adapter) of one slab after the other."""
    rates = adapter_rates(recipe.rate, recipe.adapters, recipe.popularity, recipe.skew)
    modulation = Modulation(recipe, rates)
    constant = modulation.is_constant
    sources = [AdapterArrivals(recipe, index, float(rate), constant=constant) for index, rate in enumerate(rates)]
    end_s = math.inf if recipe.duration_s is None else recipe.duration_s
    slab_s = max(_SLAB_ROWS, _SLAB_ROWS_PER_ADAPTER * recipe.adapters) / (recipe.rate * modulation.peak)
    number = 0
    while number * slab_s < end_s:
        slab = modulation.slab(number * slab_s, min((number + 1) * slab_s, end_s))
        parts = [source.within(slab) for source in sources]
        arrival_s = np.concatenate(parts)
        adapter = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        order = np.argsort(arrival_s, kind="stable")
        yield arrival_s[order], adapter[order]
        number += 1


class _Labels:
    """Turns adapter indices into rows with names."""

    def __init__(self, recipe: Recipe) -> None:
        self._adapters = _numbered("adapter", recipe.adapters)
        self._tenants = _numbered("tenant", recipe.tenants)
        self._tenant_of = deal_out(recipe.adapters, power_weights(recipe.tenants, recipe.tenant_skew))
        self._bases = pa.array([name for name, _ in recipe.base_models], pa.string())
        shares = [float(share) for _, share in recipe.base_models]
        self._base_of = deal_out(recipe.adapters, shares) if shares else None

    def table(
        self,
        arrival_s: npt.NDArray[np.float64],
        adapter: npt.NDArray[np.int32],
        prompt_tokens: npt.NDArray[np.int32],
        output_tokens: npt.NDArray[np.int32],
    ) -> pa.Table:
        known = {
            "arrival_s": pa.array(arrival_s),
            "tenant": pa.DictionaryArray.from_arrays(pa.array(self._tenant_of[adapter]), self._tenants),
            "adapter_name": pa.DictionaryArray.from_arrays(pa.array(adapter), self._adapters),
            "prompt_tokens": pa.array(prompt_tokens),
            "output_tokens": pa.array(output_tokens),
        }
        if self._base_of is not None:
            known["base_model_id"] = pa.DictionaryArray.from_arrays(pa.array(self._base_of[adapter]), self._bases)
        return trace_table(known)


def _numbered(word: str, count: int) -> pa.Array:
    digits = len(str(count - 1))
    return pa.array([f"{word}-{index:0{digits}d}" for index in range(count)])
