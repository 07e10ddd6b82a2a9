"""Where each wanted group goes: on nodes that the plan names, where it runs already, or where there is room.

Places are chosen when the plan, the nodes or what is lost changes, and kept in between: what moves has a place that
does not move. A plan that the nodes cannot hold is cut: each base keeps a group before any has a second. Pure but for
the last answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loraplex.controller.fleet.gpus import GpuLedger
from loraplex.controller.fleet.match import matched
from loraplex.controller.fleet.state import (
    FleetBase,
    Kind,
    Replica,
    RunningGroup,
    num_gpus,
    outdated_groups,
    running_groups,
)
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import GroupPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    groups: tuple[GroupPlan, ...]
    """Those of the plan, then the extra ones; ``nodes``: their places. Empty: any, for groups without GPUs."""
    num_planned: int
    asked: tuple[tuple[str, ...], ...]
    """Of each group, the nodes that the plan names."""
    left_out: frozenset[int]
    """Groups that the nodes have no room for, whatever is stopped."""


class Placer:
    def __init__(self, bases: Mapping[BaseModelId, FleetBase]) -> None:
        self._bases = bases
        self._key: object = None
        self._places: tuple[tuple[str, ...], ...] = ()
        self._left_out: frozenset[int] = frozenset()

    def place(
        self,
        plan: Sequence[GroupPlan],
        extra: Sequence[GroupPlan],
        replicas: Sequence[Replica],
        nodes: tuple[NodeStatus, ...],
    ) -> Placement:
        """``extra``: wanted where there is room beside the plan."""
        wanted = (*plan, *extra)
        up = {node.name for node in nodes}
        running = [group for group in running_groups(replicas) if group.stays or group.drains]
        adrift = frozenset(group.name for group in running if not up.issuperset(group.nodes))
        key = (tuple((Kind.of(group), group.nodes) for group in wanted), len(plan), nodes, adrift)
        if key != self._key:
            self._key = key
            found = matched(wanted, running, outdated_groups(replicas, self._bases))
            self._places, self._left_out = _Placing(wanted, len(plan), found, nodes, self._bases).made()
        return Placement(
            groups=tuple(replace(group, nodes=place) for group, place in zip(wanted, self._places, strict=True)),
            num_planned=len(plan),
            asked=tuple(group.nodes for group in wanted),
            left_out=self._left_out,
        )


class _Placing:
    def __init__(
        self,
        wanted: Sequence[GroupPlan],
        num_planned: int,
        found: Mapping[int, RunningGroup],
        nodes: tuple[NodeStatus, ...],
        bases: Mapping[BaseModelId, FleetBase],
    ) -> None:
        """``found``: index into ``wanted`` -> what runs as it."""
        self._num_planned, self._nodes, self._bases = num_planned, nodes, bases
        self._up = {node.name for node in nodes}
        # A group whose nodes are not all up may go to others of its type.
        self._wanted = [group if self._up.issuperset(group.nodes) else replace(group, nodes=()) for group in wanted]
        self._found = found

    def made(self) -> tuple[tuple[tuple[str, ...], ...], frozenset[int]]:
        places = self._around_what_runs()
        if any(index not in places for index in range(self._num_planned)):
            # What runs may stand in the way of room that there is.
            places = self._from_scratch() or places
        left_out = frozenset(index for index in range(len(self._wanted)) if index not in places)
        return tuple(places.get(index, ()) for index in range(len(self._wanted))), left_out

    def _around_what_runs(self) -> dict[int, tuple[str, ...]]:
        """First a group for each base, then the rest; of these what runs, then what has a place, then by size."""
        ledger = GpuLedger(self._nodes)
        order = sorted(
            range(len(self._wanted)),
            key=lambda i: (
                i >= self._num_planned,
                i not in self._found or not self._found[i].serves,
                i not in self._found,
                *self._by_size(i),
            ),
        )
        places: dict[int, tuple[str, ...]] = {}
        covered: set[BaseModelId] = set()
        for only_first in (True, False):
            for index in order:
                bases = Kind.of(self._wanted[index]).bases
                if index in places or (only_first and (bases <= covered or index >= self._num_planned)):
                    continue
                place = self._place(ledger, index, self._found.get(index))
                if place is not None:
                    places[index] = place
                    covered |= bases
        return places

    def _from_scratch(self) -> dict[int, tuple[str, ...]] | None:
        """Best fit by decreasing size; None when some group of the plan finds no room."""
        ledger = GpuLedger(self._nodes)
        places: dict[int, tuple[str, ...]] = {}
        for index in sorted(range(len(self._wanted)), key=lambda i: (i >= self._num_planned, *self._by_size(i))):
            place = self._place(ledger, index, None)
            if place is not None:
                places[index] = place
            elif index < self._num_planned:
                return None
        return places

    def _place(self, ledger: GpuLedger, index: int, runs_as: RunningGroup | None) -> tuple[str, ...] | None:
        group = self._wanted[index]
        per_rank = num_gpus(Kind.of(group).bases, self._bases)
        nodes = group.nodes
        if runs_as is not None and runs_as.nodes:
            if not self._up.issuperset(runs_as.nodes):
                # It serves though its node is not seen: nothing moves before it is found dead.
                return runs_as.nodes
            nodes = runs_as.nodes
        place = ledger.fitting(gpu=group.gpu, nodes=nodes, shape=group.shape, per_rank=per_rank)
        if place is not None and per_rank:
            ledger.take(place, per_rank)
        return place

    def _by_size(self, index: int) -> tuple[bool, int, int]:
        group = self._wanted[index]
        return not group.nodes, -group.shape.num_ranks, index
