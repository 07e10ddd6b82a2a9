"""The arrivals of an experiment: what planner and baselines see, and after it what is sent. Pure but for files.

Called by ``prepare``.
"""

import dataclasses
import math
from dataclasses import dataclass

import msgspec
import numpy as np

from loraplex.bench.fleet.options import Experiment, FunctionsLoad, Load, SyntheticLoad, TraceLoad
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.planner.sample import taken
from loraplex.planner.study.hours import BaseTraffic, Functions, build
from loraplex.planner.study.hours import Recipe as HoursRecipe
from loraplex.simulator.types import AdapterSize
from loraplex.traces.arrivals import AdapterName, Arrivals, Window, read_arrivals
from loraplex.traces.synth.arrivals import synthetic_arrivals
from loraplex.traces.synth.recipe import Recipe

_MINUTE_S = 60.0
_NOBODY = "nobody"
"""Tenant of requests that have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Both windows begin at second 0 and have the same tables of names."""

    planning: Arrivals
    measured: Arrivals
    """Warm-up and what counts."""
    sizes: tuple[AdapterSize, ...]
    """Of the adapters of the tables."""


def make_traffic(experiment: Experiment, load: Load, *, factor: float = 1.0) -> Traffic:
    """``factor``: on the rate, as the recipe or the functions have it. BadConfig naming what is wrong; errors of the
    files as ``read_arrivals``, ``Functions.read`` and ``parse_lengths``."""
    if isinstance(load, FunctionsLoad):
        planning, measured = _of_functions(experiment, load, factor)
    else:
        planning, measured = _of_trace(experiment, load, factor)
    known = {base.name for base in experiment.bases}
    for name in (*planning.base_models, *(adapter.base_model for adapter in planning.adapters)):
        if name not in known:
            raise BadConfig(f"the load asks for base {name!r}, which the fleet does not have", param="loads")
    if not len(planning) or not len(measured):
        raise BadConfig("the load has no requests to plan on, or none to measure", param="loads")
    return Traffic(planning=planning, measured=measured, sizes=_sizes(experiment, planning.adapters))


def _of_functions(experiment: Experiment, load: FunctionsLoad, factor: float) -> tuple[Arrivals, Arrivals]:
    minutes = math.ceil(max(experiment.planning_s, experiment.measured_s) / _MINUTE_S)
    recipe = HoursRecipe(
        traffic=tuple(
            BaseTraffic(base=BaseModelId(base), num_adapters=count, pool=load.pools[base])
            for base, count in load.adapters.items()
        ),
        scale=factor,
        cv=load.cv,
        minutes=minutes,
        seed=experiment.seed,
    )
    hours = build(Functions.read(load.functions), load.lengths, recipe)
    planning = _window(hours.planning, minutes * _MINUTE_S - experiment.planning_s, experiment.planning_s)
    return planning, _window(hours.following, 0.0, experiment.measured_s)


def _of_trace(experiment: Experiment, load: SyntheticLoad | TraceLoad, factor: float) -> tuple[Arrivals, Arrivals]:
    all_s = experiment.planning_s + experiment.measured_s
    if isinstance(load, SyntheticLoad):
        arrivals = _synthetic(experiment, load, factor, all_s)
    else:
        arrivals = _said(experiment, read_arrivals(load.path, Window(0.0, all_s), sort=True), where=load.path)
    return (
        _window(arrivals, 0.0, experiment.planning_s),
        _window(arrivals, experiment.planning_s, experiment.measured_s),
    )


def _synthetic(experiment: Experiment, load: SyntheticLoad, factor: float, duration_s: float) -> Arrivals:
    bases = tuple((base.name, 1) for base in experiment.bases)
    fields = {"base_models": bases, "seed": experiment.seed, **load.recipe, "duration_s": duration_s}
    try:
        recipe = msgspec.convert(fields, Recipe)
    except msgspec.ValidationError as error:
        raise BadConfig(f"recipe: {error}", param="recipe") from error
    recipe = msgspec.structs.replace(recipe, rate=factor * recipe.rate)
    arrivals = synthetic_arrivals(recipe)
    if not load.plain:
        return arrivals
    return dataclasses.replace(arrivals, adapter=np.full(len(arrivals), -1, dtype=np.int32), adapters=())


def _said(experiment: Experiment, arrivals: Arrivals, *, where: str) -> Arrivals:
    """With a base and a tenant for every request and adapter."""
    bases, tenants = arrivals.base_models, arrivals.tenants
    of_adapter = np.array([_index(bases, a.base_model) for a in arrivals.adapters] + [-1], dtype=np.int32)
    base = np.where(arrivals.base_model < 0, of_adapter[arrivals.adapter], arrivals.base_model)
    if (base < 0).any():
        if len(experiment.bases) > 1:
            raise BadConfig(f"{where}: a request has no base, and the fleet has several", param="loads")
        bases = (*bases, experiment.bases[0].name)
        base = np.where(base < 0, len(bases) - 1, base)
    tenant = arrivals.tenant
    if (tenant < 0).any() or any(name.tenant is None for name in arrivals.adapters):
        tenants = (*tenants, _NOBODY)
        tenant = np.where(tenant < 0, len(tenants) - 1, tenant)
    adapters = tuple(
        AdapterName(name.tenant or _NOBODY, name.base_model or bases[-1], name.name) for name in arrivals.adapters
    )
    return dataclasses.replace(
        arrivals,
        base_model=base.astype(np.int32),
        tenant=tenant.astype(np.int32),
        adapters=adapters,
        base_models=bases,
        tenants=tenants,
    )


def _index(names: tuple[str, ...], name: str | None) -> int:
    return names.index(name) if name in names else -1


def _window(arrivals: Arrivals, start_s: float, length_s: float) -> Arrivals:
    rows = np.flatnonzero((arrivals.arrival_s >= start_s) & (arrivals.arrival_s < start_s + length_s))
    return taken(arrivals, rows, arrivals.arrival_s[rows] - start_s)


def _sizes(experiment: Experiment, adapters: tuple[AdapterName, ...]) -> tuple[AdapterSize, ...]:
    ranks = experiment.lora_ranks
    found: dict[AdapterName, AdapterSize] = {}
    for base in experiment.bases:
        own = sorted((name for name in adapters if name.base_model == base.name), key=lambda name: name.name)
        for index, name in enumerate(own):
            found[name] = AdapterSize(lora_rank=ranks[index % len(ranks)])
    return tuple(found[name] for name in adapters)
