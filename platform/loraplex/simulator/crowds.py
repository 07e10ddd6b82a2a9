"""Arrivals in which some want more than before, or more than is theirs: a flash crowd, a greedy tenant. Pure.

Called by ``routing_study`` and by the same measurements on running platforms.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loraplex.core.ids import BaseModelId
from loraplex.simulator.scenarios import SMALL, make_arrivals
from loraplex.traces.arrivals import Arrivals

GREEDY, HOT = "greedy", "hot"


def flash_crowd(
    *,
    seed: int,
    spans_s: Sequence[float],
    ramp_s: float,
    crowd_factor: float,
    hot_rate: float,
    other_rate: float,
    num_adapters: int,
    num_tenants: int,
    prompt: float = 256.0,
    output: float = 128.0,
    base: BaseModelId = SMALL,
) -> Arrivals:
    """Spans of ``spans_s`` seconds, and in the last of them the crowd. The last adapter, of the first tenant, comes
    ``hot_rate`` times a second, and within ``ramp_s`` of the last span ``crowd_factor`` times as often. All others
    come ``other_rate`` times a second, and in equal spans equally: what differs is the crowd alone."""
    random = np.random.default_rng(seed)
    longest_s = max(spans_s)
    others = make_arrivals(
        num_requests=round(other_rate * longest_s),
        rate=other_rate,
        num_adapters=num_adapters,
        num_tenants=num_tenants,
        prompt=prompt,
        output=output,
        bases=(base,),
        seed=seed,
    )
    begins_s = np.cumsum([0.0, *spans_s])
    parts = [_until(others, span_s, begin_s) for span_s, begin_s in zip(spans_s, begins_s, strict=False)]
    all_others = parts[0]
    for part in parts[1:]:
        all_others = joined(all_others, part)
    most = hot_rate * crowd_factor
    times = np.cumsum(random.exponential(1 / most, size=round(2 * most * begins_s[-1])))
    times = times[times < begins_s[-1]]
    risen = np.clip((times - begins_s[-2]) / ramp_s, 0.0, 1.0)
    times = times[random.random(len(times)) < (1.0 + (crowd_factor - 1.0) * risen) / crowd_factor]
    hot = make_arrivals(
        num_requests=len(times),
        rate=1.0,
        num_adapters=1,
        num_tenants=1,
        prompt=prompt,
        output=output,
        bases=(base,),
        seed=seed + 1,
    )
    hot = dataclasses.replace(hot, arrival_s=times, adapters=(hot.adapters[0]._replace(name=HOT),))
    return joined(all_others, hot)


def greedy_tenant(
    *,
    seed: int,
    end_s: float,
    share_per_s: float,
    asked: Sequence[float],
    greedy_factor: float,
    adapters_per_tenant: int,
    prompt: float = 256.0,
    output: float = 128.0,
    base: BaseModelId = SMALL,
) -> Arrivals:
    """A tenant for each of ``asked``, which comes so many times ``share_per_s`` a second, and one, ``GREEDY``, that
    comes ``greedy_factor`` times that."""
    parts = []
    for index, (name, times) in enumerate(
        [(f"calm{i}", times) for i, times in enumerate(asked)] + [(GREEDY, greedy_factor)]
    ):
        rate = times * share_per_s
        part = make_arrivals(
            num_requests=round(rate * end_s),
            rate=rate,
            num_adapters=adapters_per_tenant,
            num_tenants=1,
            zipf=0.0,
            prompt=prompt,
            output=output,
            bases=(base,),
            seed=seed * 1000 + index,
        )
        names = tuple(adapter._replace(tenant=name, name=f"{name}-{adapter.name}") for adapter in part.adapters)
        parts.append(dataclasses.replace(part, tenants=(name,), adapters=names))
    found = parts[0]
    for part in parts[1:]:
        found = joined(found, part)
    return found


def joined(one: Arrivals, other: Arrivals) -> Arrivals:
    """Both, in order of time; tenants and adapters are told by their names. Of the same bases."""
    tenants = tuple(dict.fromkeys((*one.tenants, *other.tenants)))
    adapters = tuple(dict.fromkeys((*one.adapters, *other.adapters)))
    tenant_of = np.array([tenants.index(name) for name in other.tenants], dtype=np.int32)
    adapter_of = np.array([adapters.index(name) for name in other.adapters], dtype=np.int32)
    times = np.concatenate([one.arrival_s, other.arrival_s])
    order = np.argsort(times, kind="stable")

    def both(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.concatenate([first, second])[order]

    return dataclasses.replace(
        one,
        arrival_s=times[order],
        adapter=both(one.adapter, adapter_of[other.adapter]),
        base_model=both(one.base_model, other.base_model),
        tenant=both(one.tenant, tenant_of[other.tenant]),
        prompt_tokens=both(one.prompt_tokens, other.prompt_tokens),
        output_tokens=both(one.output_tokens, other.output_tokens),
        adapters=adapters,
        tenants=tenants,
    )


def _until(arrivals: Arrivals, span_s: float, begin_s: float) -> Arrivals:
    """Those of the first ``span_s`` seconds, ``begin_s`` later."""
    rows = arrivals.arrival_s < span_s
    return dataclasses.replace(
        arrivals,
        arrival_s=arrivals.arrival_s[rows] + begin_s,
        adapter=arrivals.adapter[rows],
        base_model=arrivals.base_model[rows],
        tenant=arrivals.tenant[rows],
        prompt_tokens=arrivals.prompt_tokens[rows],
        output_tokens=arrivals.output_tokens[rows],
    )
