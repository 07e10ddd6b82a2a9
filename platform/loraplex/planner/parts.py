"""A choice cut into parts that share no request: each can be simulated alone, and once for many choices.

Two groups belong together if some request of the trace may go to either. Adapters that are in no set of a base whose
groups all have one belong to no part: they count as lost. Called by ``scoring``.
"""

from dataclasses import dataclass

import numpy as np

from loraplex.planner.packing import Choice
from loraplex.planner.problem import Problem
from loraplex.simulator.types import IntArray
from loraplex.traces.arrivals import Arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    choice: Choice
    """Its groups alone, in one order for all choices that have them."""
    groups: tuple[int, ...]
    """Where each of these is in the whole choice."""


class Divider:
    """For choices about one trace."""

    def __init__(self, problem: Problem, arrivals: Arrivals) -> None:
        self._bases = problem.bases
        index: dict[str | None, int] = {base: position for position, base in enumerate(problem.bases)}
        of_adapter = [index.get(name.base_model, -1) for name in arrivals.adapters]
        self._base_of_adapter = np.array([*of_adapter, -1], dtype=np.int32)
        of_base = np.array([index[base] for base in arrivals.base_models] + [-1], dtype=np.int32)
        self._base: IntArray = np.where(
            arrivals.base_model >= 0, of_base[arrivals.base_model], self._base_of_adapter[arrivals.adapter]
        ).astype(np.int32)
        self._adapter = arrivals.adapter
        asked = np.unique(arrivals.adapter[arrivals.adapter >= 0])
        self._asked = [
            frozenset(asked[self._base_of_adapter[asked] == position].tolist()) for position in range(len(self._bases))
        ]
        plain = np.unique(self._base[arrivals.adapter < 0])
        self._has_plain = [position in plain for position in range(len(self._bases))]

    def parts(self, choice: Choice) -> list[Part]:
        """In the order of their first groups."""
        joined = list(range(len(choice.groups)))

        def root(group: int) -> int:
            while joined[group] != group:
                joined[group] = joined[joined[group]]
                group = joined[group]
            return group

        for position, base in enumerate(self._bases):
            hosts = [group for group, kind in enumerate(choice.groups) if base in kind.bases]
            if not hosts:
                continue
            if self._is_open(choice, hosts, position):
                for group in hosts[1:]:
                    joined[root(group)] = root(hosts[0])
                continue
            first: dict[int, int] = {}
            seen: dict[frozenset[int] | None, int] = {}
            for group in hosts:
                members = choice.set_of(group)
                if members in seen:
                    joined[root(group)] = root(seen[members])
                    continue
                seen[members] = group
                for adapter in (members or frozenset()) & self._asked[position]:
                    joined[root(group)] = root(first.setdefault(adapter, group))
        found: dict[int, list[int]] = {}
        for group in range(len(choice.groups)):
            found.setdefault(root(group), []).append(group)
        return [_part(choice, groups) for groups in found.values()]

    def rows(self, choice: Choice) -> IntArray:
        """The requests of a part."""
        wanted = np.zeros(len(self._base_of_adapter), dtype=np.bool_)
        plain = np.zeros(len(self._bases) + 1, dtype=np.bool_)
        for position, base in enumerate(self._bases):
            hosts = [group for group, kind in enumerate(choice.groups) if base in kind.bases]
            if not hosts:
                continue
            plain[position] = True
            if any(choice.set_of(group) is None for group in hosts):
                wanted |= self._base_of_adapter == position
            else:
                members = frozenset().union(*(choice.set_of(group) or frozenset() for group in hosts))
                chosen = np.array(sorted(members & self._asked[position]), dtype=np.int64)
                wanted[chosen] = True
        return np.flatnonzero(np.where(self._adapter >= 0, wanted[self._adapter], plain[self._base])).astype(np.int32)

    def _is_open(self, choice: Choice, hosts: list[int], position: int) -> bool:
        """Whether some request of the base may go to any of its groups."""
        return self._has_plain[position] or any(choice.set_of(group) is None for group in hosts)


def _part(choice: Choice, groups: list[int]) -> Part:
    ordered = sorted(groups, key=lambda group: (str(choice.groups[group]), group))
    kinds = tuple(choice.groups[group] for group in ordered)
    bases = {base for kind in kinds for base in kind.bases}
    return Part(
        choice=Choice(
            groups=kinds,
            spread={base: value for base, value in choice.spread.items() if base in bases},
            sets=tuple(choice.set_of(group) for group in ordered),
        ),
        groups=tuple(ordered),
    )
