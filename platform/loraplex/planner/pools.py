"""Where a search begins: for each base a kind of group and a number of GPUs, then its adapters cut by prompt length
into pools with GPUs of their own, all found by simulation.

The fluid ``capacity`` only says in which order kinds are tried: what batching, pipelines and bursts do to groups the
simulator tells. Pools share no request, so a change of one costs the simulation of that one. Called by ``search``.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations
from typing import NamedTuple

import numpy as np

from loraplex.core.ids import BaseModelId
from loraplex.planner.capacity import Demand
from loraplex.planner.cells import cell, joined
from loraplex.planner.packing import AdapterSet, Choice
from loraplex.planner.problem import Kind
from loraplex.planner.scoring import Scored, Scorer
from loraplex.planner.starts import best_kinds

_LIKELY_KINDS = 4
_TOGETHER = 3
"""Kinds that hold all bases which are tried on all GPUs."""
_CUTS = ((0.3, 0.3), (0.5, 0.5), (0.5, 0.35), (0.7, 0.7), (0.7, 0.5), (0.85, 0.85), (0.85, 0.65))
"""(Share of the load of the shorter prompts, share of the GPUs that serve them)."""
_HOPE = 0.01
"""A cut that is no more than this behind is worth a climb."""
_MAX_POOLS = 3
"""Of a base on one type of GPU."""
OUTPUT_COST = 4.0
"""Prompt tokens that an output token stands for where adapters are divided by their load."""

Try = Callable[[Choice, str], Scored | None]


class _Place(NamedTuple):
    gpu: str
    base: BaseModelId
    adapters: AdapterSet | None
    """None: all of the base."""


class _Pool(NamedTuple):
    kind: Kind
    num_gpus: int


_Layout = dict[_Place, _Pool]


class Pools:
    """``attempt`` scores a choice and remembers it if it is good; ``is_over`` ends the work between two attempts."""

    def __init__(
        self, scorer: Scorer, demand: Mapping[BaseModelId, Demand], attempt: Try, is_over: Callable[[], bool]
    ) -> None:
        problem = scorer.problem
        self._scorer, self._demand = scorer, demand
        self._attempt, self._is_over = attempt, is_over
        self._gpus = {
            gpu: sum(node.num_gpus for node in problem.nodes if node.gpu == gpu)
            for gpu in dict.fromkeys(node.gpu for node in problem.nodes)
        }
        self._kinds = {
            (gpu, base): ranked
            for gpu in self._gpus
            for base in problem.bases
            if demand[base].requests_per_s > 0
            and (ranked := [kind for kind in best_kinds(problem, scorer.capacity, base) if kind.gpu == gpu])
        }

    def explore(self) -> bool:
        """Kinds at the share of GPUs that the demand asks for, then the share, coarse to fine; then cuts. False: so few
        GPUs that by demand a base gets none."""
        layout = self._by_demand()
        value = self._value(layout, "GPUs by demand")
        if value is None:
            self._together()
            return False
        layout, value = self._best_kinds(layout, value)
        layout, value = self._climbed(layout, value, max(1, max(self._gpus.values()) // 4))
        self._together()
        while not self._is_over():
            cut = max(self._cuts(layout), key=lambda one: one[1], default=None)
            if cut is None or cut[1] < value - _HOPE:
                break
            other, worth = self._climbed(*cut, max(1, max(self._gpus.values()) // 16))
            if worth <= value:
                break
            layout, value = other, worth
        return True

    def _best_kinds(self, layout: _Layout, value: float) -> tuple[_Layout, float]:
        """Every kind for every pool; afterwards only the likely ones are tried."""
        for place in layout:
            found = [(value, layout[place].kind)]
            for kind in self._kinds[place.gpu, place.base]:
                if kind != layout[place].kind:
                    other = {**layout, place: layout[place]._replace(kind=kind)}
                    worth = self._value(other, f"{place.base} in {_shape(kind)}")
                    if worth is not None:
                        found.append((worth, kind))
            found.sort(key=lambda one: -one[0])
            value, best = found[0]
            layout = {**layout, place: layout[place]._replace(kind=best)}
            unseen = [kind for kind in self._kinds[place.gpu, place.base] if kind not in {kind for _, kind in found}]
            self._kinds[place.gpu, place.base] = [*(kind for _, kind in found), *unseen]
        return layout, value

    def _climbed(self, layout: _Layout, value: float, step: int) -> tuple[_Layout, float]:
        while step and not self._is_over():
            for other, what in self._neighbours(layout, step):
                worth = self._value(other, what)
                if worth is not None and worth > value:
                    value, layout = worth, other
                    break
            else:
                step //= 2
        return layout, value

    def _neighbours(self, layout: _Layout, step: int) -> Iterator[tuple[_Layout, str]]:
        for giver, taker in permutations(layout, 2):
            if giver.gpu == taker.gpu and layout[giver].num_gpus > step:
                yield (
                    {
                        **layout,
                        giver: layout[giver]._replace(num_gpus=layout[giver].num_gpus - step),
                        taker: layout[taker]._replace(num_gpus=layout[taker].num_gpus + step),
                    },
                    f"{step} GPUs from {_named(giver)} to {_named(taker)}",
                )
        for place, pool in layout.items():
            for kind in self._kinds[place.gpu, place.base][:_LIKELY_KINDS]:
                if kind != pool.kind:
                    yield {**layout, place: pool._replace(kind=kind)}, f"{_named(place)} in {_shape(kind)}"

    def _cuts(self, layout: _Layout) -> Iterator[tuple[_Layout, float]]:
        """Each pool cut in two, the adapters of shorter prompts and those of longer ones."""
        if (self._scorer.problem.arrivals.adapter < 0).any():
            return
        for place, pool in layout.items():
            if sum((one.gpu, one.base) == (place.gpu, place.base) for one in layout) >= _MAX_POOLS:
                continue
            if sum(one.base == place.base and one.gpu != place.gpu for one in layout):
                continue
            members, passed = self._by_prompt(place)
            for of_load, of_gpus in _CUTS:
                at = int(np.searchsorted(passed, of_load))
                gpus = round(of_gpus * pool.num_gpus)
                if not 0 < at < len(members) or not 0 < gpus < pool.num_gpus:
                    continue
                other = {one: kept for one, kept in layout.items() if one != place}
                other[place._replace(adapters=frozenset(members[:at]))] = pool._replace(num_gpus=gpus)
                other[place._replace(adapters=frozenset(members[at:]))] = pool._replace(num_gpus=pool.num_gpus - gpus)
                what = f"{at} of {len(members)} adapters of {place.base}, of short prompts, on {gpus} GPUs alone"
                worth = self._value(other, what)
                if worth is not None:
                    yield other, worth

    def _by_prompt(self, place: _Place) -> tuple[list[int], np.ndarray]:
        """Its adapters that are asked for, short prompts first, and the load passed after each, as a share."""
        traffic = self._scorer.traffic
        known = traffic.base[place.base].tolist() if place.adapters is None else place.adapters
        asked = [adapter for adapter in known if traffic.requests_per_s[adapter] > 0]
        members = sorted(asked, key=lambda adapter: (float(traffic.prompt_tokens[adapter]), adapter))
        tokens = traffic.prompt_tokens[members] + OUTPUT_COST * traffic.output_tokens[members]
        passed = np.cumsum(traffic.requests_per_s[members] * tokens)
        return members, passed / passed[-1] if len(passed) else passed

    def _by_demand(self) -> _Layout:
        """Each type of GPU divided by the GPUs that each base needs of it."""
        capacity = self._scorer.capacity
        layout: _Layout = {}
        for gpu, total in self._gpus.items():
            best = {base: ranked[0] for (of, base), ranked in self._kinds.items() if of == gpu}
            need = {
                base: self._demand[base].requests_per_s * kind.shape.num_ranks / capacity[kind, base].requests_per_s
                for base, kind in best.items()
            }
            left = total
            for base, kind in sorted(best.items(), key=lambda one: -one[1].shape.num_ranks):
                share = max(kind.shape.num_ranks, round(total * need[base] / max(sum(need.values()), 1e-12)))
                share = min(left, share - share % kind.shape.num_ranks)
                layout[_Place(gpu, base, None)] = _Pool(kind, share)
                left -= share
            for base, kind in best.items():
                if kind.shape.num_ranks <= left:
                    place = _Place(gpu, base, None)
                    layout[place] = _Pool(kind, layout[place].num_gpus + left)
                    break
        return layout

    def _together(self) -> None:
        """All bases in every group."""
        capacity, bases = self._scorer.capacity, set(self._scorer.problem.bases)
        if len(bases) < 2:
            return

        def need(kind: Kind) -> float:
            return kind.shape.num_ranks * sum(
                self._demand[base].requests_per_s * capacity[kind, base].request_s for base in kind.bases
            )

        together = [kind for kind in self._scorer.kinds if set(kind.bases) == bases]
        for kind in sorted(together, key=need)[:_TOGETHER]:
            if self._is_over():
                return
            groups = (kind,) * (self._gpus[kind.gpu] // kind.shape.num_ranks)
            self._attempt(Choice(groups=groups), f"all bases in {_shape(kind)}")

    def _value(self, layout: _Layout, what: str) -> float | None:
        """None when a pool has no group, or the groups do not fit, or the time is over."""
        if self._is_over():
            return None
        cells = [cell(self._filled(place, pool), place.adapters) for place, pool in layout.items()]
        if {base for one in cells for base in one.bases} != {base for _, base in self._kinds}:
            return None
        if any(not one.groups and one.adapters is not None for one in cells):
            return None
        scored = self._attempt(joined(cells, {}), what)
        return None if scored is None else scored.value

    def _filled(self, place: _Place, pool: _Pool) -> list[Kind]:
        """As many of the kind as the pool's GPUs allow, on the rest others, the best first."""
        left, groups = pool.num_gpus, []
        for kind in (pool.kind, *self._kinds[place.gpu, place.base]):
            count, left = divmod(left, kind.shape.num_ranks)
            groups += [kind] * count
        return groups


def _named(place: _Place) -> str:
    return place.base if place.adapters is None else f"{len(place.adapters)} adapters of {place.base}"


def _shape(kind: Kind) -> str:
    return f"tp{kind.shape.tp} pp{kind.shape.pp}"
