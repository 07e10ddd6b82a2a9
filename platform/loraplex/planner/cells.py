"""A choice as cells: groups that share the same adapters, which a move changes, cuts or joins.

Called by ``moves``.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loraplex.core.ids import BaseModelId
from loraplex.planner.packing import AdapterSet, Choice
from loraplex.planner.problem import Kind


class Cell(NamedTuple):
    groups: tuple[Kind, ...]
    """Sorted."""
    adapters: AdapterSet | None
    """None: all of its bases."""

    @property
    def bases(self) -> frozenset[BaseModelId]:
        return frozenset(base for kind in self.groups for base in kind.bases)

    @property
    def num_gpus(self) -> int:
        return sum(kind.shape.num_ranks for kind in self.groups)


def cells_of(choice: Choice) -> list[Cell]:
    """Groups without a set are one cell if bases that they share join them."""
    found: list[tuple[set[BaseModelId], AdapterSet | None, list[Kind]]] = []
    for index, kind in enumerate(choice.groups):
        members = choice.set_of(index)
        bases, groups = set(kind.bases), [kind]
        apart = []
        for known in found:
            if known[1] == members and known[0] & bases:
                bases |= known[0]
                groups = known[2] + groups
            else:
                apart.append(known)
        found = [*apart, (bases, members, groups)]
    return [cell(groups, members) for _, members, groups in found]


def cell(groups: Iterable[Kind], adapters: AdapterSet | None) -> Cell:
    return Cell(tuple(sorted(groups, key=str)), adapters)


def joined(cells: Iterable[Cell], spread: Mapping[BaseModelId, float]) -> Choice:
    """One choice for all orders of the cells; cells without groups are left out."""
    ordered = sorted((one for one in cells if one.groups), key=lambda one: (str(one.groups[0]), _first(one), one[0]))
    return Choice(
        groups=tuple(kind for one in ordered for kind in one.groups),
        spread=spread,
        sets=tuple(one.adapters for one in ordered for _ in one.groups)
        if any(one.adapters is not None for one in ordered)
        else (),
    )


def _first(one: Cell) -> int:
    return -1 if one.adapters is None else min(one.adapters, default=-1)
