"""Where a search begins: for each base one kind of group and a number of GPUs, both found by simulation.

The fluid ``capacity`` only says in which order kinds are tried: what batching, pipelines and bursts do to a base's
groups the simulator tells. Each base's groups are a part of their own, so a change of one base costs the simulation of
that base alone. Called by ``search``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

from loraplex.core.ids import BaseModelId
from loraplex.planner.capacity import Demand
from loraplex.planner.packing import Choice
from loraplex.planner.problem import Kind, Problem
from loraplex.planner.scoring import Scored
from loraplex.planner.starts import Capacities, best_kinds

_LIKELY_KINDS = 4
_TOGETHER = 3
"""Kinds that hold all bases which are tried on all GPUs."""

Try = Callable[[Choice, str], Scored | None]


@dataclass(frozen=True, slots=True)
class _Pool:
    """The GPUs of one type that one base has."""

    kind: Kind
    num_gpus: int


_Layout = dict[tuple[str, BaseModelId], _Pool]


class Pools:
    """``attempt`` scores a choice and remembers it if it is good; ``is_over`` ends the work between two attempts."""

    def __init__(
        self,
        problem: Problem,
        capacity: Capacities,
        demand: Mapping[BaseModelId, Demand],
        attempt: Try,
        is_over: Callable[[], bool],
    ) -> None:
        self._problem, self._capacity, self._demand = problem, capacity, demand
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
            and (ranked := [kind for kind in best_kinds(problem, capacity, base) if kind.gpu == gpu])
        }

    def explore(self) -> None:
        """Kinds at the share of GPUs that the demand asks for, then the share, coarse to fine, then kinds again."""
        layout = self._by_demand()
        value = self._value(layout, "share of the demand")
        if value is None:
            return
        ranked: dict[tuple[str, BaseModelId], list[Kind]] = {}
        for place in layout:
            found = [(value, layout[place].kind)]
            for kind in self._kinds[place]:
                if kind != layout[place].kind:
                    other = {**layout, place: _Pool(kind, layout[place].num_gpus)}
                    worth = self._value(other, f"{place[1]} in {_shape(kind)}")
                    if worth is not None:
                        found.append((worth, kind))
            found.sort(key=lambda one: -one[0])
            value, best = found[0]
            layout = {**layout, place: _Pool(best, layout[place].num_gpus)}
            ranked[place] = [kind for _, kind in found[:_LIKELY_KINDS]]
        self._together()
        step = max(1, max(self._gpus.values()) // 4)
        while step and not self._is_over():
            for other, what in self._neighbours(layout, step, ranked):
                worth = self._value(other, what)
                if worth is not None and worth > value:
                    value, layout = worth, other
                    break
            else:
                step //= 2

    def _neighbours(
        self, layout: _Layout, step: int, ranked: Mapping[tuple[str, BaseModelId], list[Kind]]
    ) -> Iterator[tuple[_Layout, str]]:
        for giver, taker in permutations(layout, 2):
            if giver[0] == taker[0] and layout[giver].num_gpus > step:
                yield (
                    {
                        **layout,
                        giver: _Pool(layout[giver].kind, layout[giver].num_gpus - step),
                        taker: _Pool(layout[taker].kind, layout[taker].num_gpus + step),
                    },
                    f"{step} GPUs from {giver[1]} to {taker[1]}",
                )
        for place, pool in layout.items():
            for kind in ranked[place]:
                if kind != pool.kind:
                    yield {**layout, place: _Pool(kind, pool.num_gpus)}, f"{place[1]} in {_shape(kind)}"

    def _by_demand(self) -> _Layout:
        """Each type of GPU divided by the GPUs that each base needs of it."""
        layout: dict[tuple[str, BaseModelId], _Pool] = {}
        for gpu, total in self._gpus.items():
            best = {base: ranked[0] for (of, base), ranked in self._kinds.items() if of == gpu}
            need = {
                base: self._demand[base].requests_per_s
                * kind.shape.num_ranks
                / self._capacity[kind, base].requests_per_s
                for base, kind in best.items()
            }
            left = total
            for base, kind in sorted(best.items(), key=lambda one: -one[1].shape.num_ranks):
                share = max(kind.shape.num_ranks, round(total * need[base] / max(sum(need.values()), 1e-12)))
                share = min(left, share - share % kind.shape.num_ranks)
                layout[gpu, base] = _Pool(kind, share)
                left -= share
            for base, kind in best.items():
                if kind.shape.num_ranks <= left:
                    layout[gpu, base] = _Pool(kind, layout[gpu, base].num_gpus + left)
                    break
        return layout

    def _together(self) -> None:
        """All bases in every group."""
        bases = set(self._problem.bases)
        together = [kind for kind in dict.fromkeys(kind for kind, _ in self._capacity) if set(kind.bases) == bases]
        if len(bases) < 2:
            return

        def need(kind: Kind) -> float:
            return kind.shape.num_ranks * sum(
                self._demand[base].requests_per_s * self._capacity[kind, base].request_s for base in kind.bases
            )

        for kind in sorted(together, key=need)[:_TOGETHER]:
            if self._is_over():
                return
            groups = (kind,) * (self._gpus[kind.gpu] // kind.shape.num_ranks)
            self._attempt(Choice(groups=groups), f"all bases in {_shape(kind)}")

    def _value(self, layout: _Layout, what: str) -> float | None:
        """None when a base has no group, or the groups do not fit, or the time is over."""
        if self._is_over():
            return None
        groups: list[Kind] = []
        for place, pool in layout.items():
            groups += self._filled(place, pool)
        if {base for kind in groups for base in kind.bases} != {base for _, base in self._kinds}:
            return None
        scored = self._attempt(Choice(groups=tuple(sorted(groups, key=str))), what)
        return None if scored is None else scored.value

    def _filled(self, place: tuple[str, BaseModelId], pool: _Pool) -> list[Kind]:
        """As many of the kind as the pool's GPUs allow, on the rest others, the best per GPU first."""
        left, groups = pool.num_gpus, []
        for kind in (pool.kind, *self._kinds[place]):
            count, left = divmod(left, kind.shape.num_ranks)
            groups += [kind] * count
        return groups


def _shape(kind: Kind) -> str:
    return f"tp{kind.shape.tp} pp{kind.shape.pp}"
