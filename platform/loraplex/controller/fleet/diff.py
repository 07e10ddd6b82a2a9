"""From the plan and what runs to the next actions. Pure; asked again after every change, it comes to rest at the plan.

Make before break: a group that has no successor yet goes on until every group of the plan serves with its adapters.
Only where the GPUs do not hold both does an old one drain first: for one new group at a time, and never the last
replica of a base while another can go. An adapter leaves a replica when all that gain one have it. Groups of another
release than their base has now are replaced in the same way, one at a time, whenever all is as the plan says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loraplex.controller.fleet.gpus import GpuLedger
from loraplex.controller.fleet.match import matched
from loraplex.controller.fleet.placing import Placement
from loraplex.controller.fleet.state import (
    FleetBase,
    Kind,
    Replica,
    ReplicaState,
    RunningGroup,
    adapter_keys,
    num_gpus,
    outdated_groups,
    running_groups,
)
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import AdapterShare, GroupPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplicas:
    """Of a group that is new (``group`` empty), or those that its group lacks."""

    plan: GroupPlan
    bases: tuple[BaseModelId, ...]
    group: str = ""
    nodes: tuple[str, ...] = ()
    """For its ranks; empty: the actuator chooses."""
    planned_nodes: tuple[str, ...] = ()
    """Those of the plan, where it cannot have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    replica_id: ReplicaId
    adapters: tuple[AdapterShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    replica_ids: tuple[ReplicaId, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeBack:
    """What drains is wanted again."""

    replica_ids: tuple[ReplicaId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    replica_ids: tuple[ReplicaId, ...]
    reason: str


Action = StartReplicas | Assign | Drain | TakeBack | Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    replicas: tuple[Replica, ...]
    """In the order in which they were recorded."""
    nodes: tuple[NodeStatus, ...]
    """That are up and may be given work."""
    held_back: frozenset[Kind] = frozenset()
    """Wait for their next attempt."""
    drained: frozenset[ReplicaId] = frozenset()
    """Draining replicas that have nothing left, or have had their time."""
    crowded: frozenset[str] = frozenset()
    """Groups that have been starting for so long that the machines seem to have no room for them."""
    may_grow: bool = False
    """Groups that the nodes have no room for are started all the same: who waits for room makes the cluster grow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    actions: tuple[Action, ...]
    groups: Mapping[int, RunningGroup]
    """Index into the wanted groups (those of the plan, then the extra ones) -> what is or becomes it."""
    left_out: frozenset[int]
    """As in the placement."""
    settled: bool
    """All is as the plan says, but for what is left out."""


def decide(placement: Placement, observed: Observed, bases: Mapping[BaseModelId, FleetBase]) -> Decided:
    """Extra groups of the placement are started where GPUs are free; nothing is stopped for them."""
    decision = _Decision(placement, observed, bases)
    decided = decision.made()
    renewed = decision.next_to_renew() if decided.settled else None
    if renewed is None:
        return decided
    renewal = _Decision(placement, observed, bases, renewed=renewed).made()
    return replace(decided, actions=renewal.actions)


class _Decision:
    def __init__(
        self,
        placement: Placement,
        observed: Observed,
        bases: Mapping[BaseModelId, FleetBase],
        *,
        renewed: RunningGroup | None = None,
    ) -> None:
        """``renewed``: is not to be taken for a group of the plan any more."""
        self._renewed = renewed
        self._observed, self._bases, self._placement = observed, bases, placement
        self._wanted, self._num_planned, self._left_out = placement.groups, placement.num_planned, placement.left_out
        self._running = running_groups(observed.replicas)
        self._up = {node.name for node in observed.nodes}
        self._outdated = outdated_groups(observed.replicas, bases)
        found = matched(self._wanted, self._running, self._outdated)
        self._everything = {index: group for index, group in found.items() if group != renewed}
        self._groups = {index: group for index, group in self._everything.items() if index not in self._left_out}
        self._waiting = {
            group.name for index, group in self._everything.items() if index in self._left_out and observed.may_grow
        }
        kept = {group.name for group in self._groups.values()} | self._waiting
        self._obsolete = [group for group in self._running if group.stays and group.name not in kept]
        self._free = GpuLedger(observed.nodes)
        self._places: dict[str, tuple[str, ...]] = {}
        for group in self._running:
            self._places[group.name] = self._place_of(group)
            self._free.take(self._places[group.name], self._per_rank(group.bases))
        self._actions: list[Action] = []

    def made(self) -> Decided:
        self._abandon_lost_starts()
        self._stop_drained()
        self._take_back()
        blocked = self._start()
        pending = self._assign()
        if self._all_serve() and not pending:
            for group in self._obsolete:
                self._let_go(group, "the plan does not have it")
        else:
            self._make_room(blocked)
        settled = (
            not self._actions
            and all(index in self._groups and self._groups[index].serves for index in self._served_indices())
            and {group.name for group in self._running}
            <= {group.name for group in self._groups.values()} | self._waiting
        )
        return Decided(
            actions=tuple(self._actions),
            groups=self._groups,
            left_out=self._left_out,
            settled=settled,
        )

    def next_to_renew(self) -> RunningGroup | None:
        """The outdated group whose leave does the least harm; None: there is none, or its successor has to wait."""
        outdated = [group for group in self._groups.values() if group.name in self._outdated]
        if not outdated:
            return None
        chosen = self._by_harm(outdated)[0]
        kinds = {Kind.of(self._wanted[index]) for index, group in self._groups.items() if group == chosen}
        return None if kinds & self._observed.held_back else chosen

    def _served_indices(self) -> list[int]:
        return [index for index in range(self._num_planned) if index not in self._left_out]

    def _per_rank(self, bases: frozenset[BaseModelId]) -> float:
        return num_gpus(bases, self._bases)

    def _place_of(self, group: RunningGroup) -> tuple[str, ...]:
        """Where it holds GPUs, as far as can be told."""
        if group.name in self._waiting:
            return ()
        if group.nodes:
            return group.nodes
        per_rank = self._per_rank(group.bases)
        return self._free.fitting(gpu=group.gpu, nodes=(), shape=group.shape, per_rank=per_rank) or ()

    def _abandon_lost_starts(self) -> None:
        for group in self._running:
            lost = [node for node in group.first.target.nodes if node not in self._up]
            starting = tuple(m.target.replica_id for m in group.members if m.state is ReplicaState.STARTING)
            if lost and starting:
                self._actions.append(Stop(replica_ids=starting, reason=f"node {lost[0]} is not up"))

    def _stop_drained(self) -> None:
        for group in self._running:
            done = tuple(
                member.target.replica_id
                for member in group.members
                if member.state is ReplicaState.DRAINING and member.target.replica_id in self._observed.drained
            )
            wanted_again = any(group.name == kept.name for kept in self._groups.values())
            if done and not wanted_again:
                self._actions.append(Stop(replica_ids=done, reason="drained"))

    def _take_back(self) -> None:
        for group in self._groups.values():
            draining = tuple(m.target.replica_id for m in group.members if m.state is ReplicaState.DRAINING)
            if draining:
                self._actions.append(TakeBack(replica_ids=draining))

    def _start(self) -> list[int]:
        """Indices of the groups that find no room now, first what serves a base that nothing serves."""
        blocked = []
        served = self._num_serving()
        missing = [index for index in range(len(self._wanted)) if index not in self._left_out]
        missing.sort(
            key=lambda i: (
                i >= self._num_planned,
                all(served.get(placed.base_model_id, 0) for placed in self._wanted[i].bases),
                i,
            )
        )
        for index in missing:
            group, runs = self._wanted[index], self._groups.get(index)
            kind = Kind.of(group)
            if kind in self._observed.held_back:
                continue
            if runs is not None:
                lacking = tuple(sorted(runs.bases - {member.target.base_model_id for member in runs.members}))
                if lacking and runs.stays:
                    self._actions.append(StartReplicas(plan=group, bases=lacking, group=runs.name, nodes=runs.nodes))
                continue
            per_rank = self._per_rank(kind.bases)
            place = self._free.fitting(gpu=group.gpu, nodes=group.nodes, shape=group.shape, per_rank=per_rank)
            planned = self._placement.asked[index]
            if place is None and self._renewed is not None and not planned:
                # Its place is taken by what it replaces; any other of the type does.
                place = self._free.fitting(gpu=group.gpu, nodes=(), shape=group.shape, per_rank=per_rank)
                planned = group.nodes
            if place is None:
                blocked.append(index)
                continue
            self._free.take(place, per_rank)
            self._actions.append(
                StartReplicas(
                    plan=group,
                    bases=tuple(placed.base_model_id for placed in group.bases),
                    nodes=place,
                    planned_nodes=planned if planned != place else (),
                )
            )
        if self._observed.may_grow:
            for index in sorted(self._left_out):
                group = self._wanted[index]
                is_new = index < self._num_planned and index not in self._everything
                if is_new and Kind.of(group) not in self._observed.held_back:
                    bases = tuple(placed.base_model_id for placed in group.bases)
                    self._actions.append(StartReplicas(plan=group, bases=bases))
        return blocked

    def _assign(self) -> bool:
        """True while an adapter is still on its way to a replica that lacks it."""
        removals: list[Assign] = []
        additions: list[Assign] = []
        for index, group in self._groups.items():
            for member in group.members:
                if member.state is not ReplicaState.SERVING:
                    continue
                want = _shares(self._wanted[index], member.target.base_model_id)
                have = member.target.adapters
                if want == have:
                    continue
                if adapter_keys(want) <= adapter_keys(have):
                    removals.append(Assign(replica_id=member.target.replica_id, adapters=want))
                else:
                    leaving = tuple(one for one in have if (one.tenant, one.name) not in adapter_keys(want))
                    additions.append(Assign(replica_id=member.target.replica_id, adapters=(*want, *leaving)))
        self._actions += additions
        if not additions and self._all_serve():
            self._actions += removals
        return bool(additions)

    def _all_serve(self) -> bool:
        return all(index in self._groups and self._groups[index].serves for index in self._served_indices())

    def _make_room(self, blocked: Sequence[int]) -> None:
        """Drains old groups for the first new one that has no room, unless room is coming or something is still being
        made that could replace more."""
        leaving = any(not group.stays for group in self._running)
        if leaving or any(isinstance(action, StartReplicas | Stop) for action in self._actions):
            return
        starting = [group for group in self._groups.values() if not group.serves and group.stays]
        crowded = [group for group in starting if group.name in self._observed.crowded]
        if crowded:
            victims = self._by_harm(self._obsolete)[:1]
            for victim in victims:
                self._let_go(victim, f"to make room for {crowded[0].name}")
            return
        if starting:
            return
        for index in blocked:
            if index >= self._num_planned:
                continue
            victims = self._victims(self._wanted[index])
            for victim in victims:
                self._let_go(victim, f"to make room for group {self._wanted[index].name}")
            if victims:
                return

    def _victims(self, wanted: GroupPlan) -> list[RunningGroup]:
        """As few obsolete groups as free the GPUs for ``wanted``, the least harmful first; empty: none do."""
        per_rank = self._per_rank(Kind.of(wanted).bases)
        chosen: list[RunningGroup] = []

        def fits() -> bool:
            return (
                self._free.fitting(gpu=wanted.gpu, nodes=wanted.nodes, shape=wanted.shape, per_rank=per_rank)
                is not None
            )

        candidates = list(self._obsolete)
        while candidates and not fits():
            victim = self._by_harm(candidates, gone=chosen)[0]
            candidates.remove(victim)
            chosen.append(victim)
            self._free.give(self._places[victim.name], self._per_rank(victim.bases))
        if not fits():
            needed: list[RunningGroup] = []
        else:
            needed = list(chosen)
            for victim in chosen:
                self._free.take(self._places[victim.name], self._per_rank(victim.bases))
                if fits():
                    needed.remove(victim)
                else:
                    self._free.give(self._places[victim.name], self._per_rank(victim.bases))
        for victim in needed or chosen:
            self._free.take(self._places[victim.name], self._per_rank(victim.bases))
        return needed

    def _by_harm(self, groups: Sequence[RunningGroup], gone: Sequence[RunningGroup] = ()) -> list[RunningGroup]:
        """Last those that are the last of a base, first those that do not serve yet and the smaller ones."""
        without = {group.name for group in gone}
        served = self._num_serving(without)

        def harm(group: RunningGroup) -> tuple[bool, bool, int]:
            last = any(
                served.get(member.target.base_model_id, 0) <= 1
                for member in group.members
                if member.state is ReplicaState.SERVING
            )
            return last, group.serves, group.shape.num_ranks

        return sorted(groups, key=harm)

    def _num_serving(self, without: set[str] | frozenset[str] = frozenset()) -> dict[BaseModelId, int]:
        served: dict[BaseModelId, int] = {}
        for group in self._running:
            for member in group.members:
                if member.state is ReplicaState.SERVING and group.name not in without:
                    served[member.target.base_model_id] = served.get(member.target.base_model_id, 0) + 1
        return served

    def _let_go(self, group: RunningGroup, reason: str) -> None:
        """What serves drains; what still starts is stopped, unless that was decided already."""
        stopped = {one for action in self._actions if isinstance(action, Stop) for one in action.replica_ids}
        serving = tuple(m.target.replica_id for m in group.members if m.state is ReplicaState.SERVING)
        starting = tuple(
            m.target.replica_id
            for m in group.members
            if m.state is ReplicaState.STARTING and m.target.replica_id not in stopped
        )
        if serving:
            self._actions.append(Drain(replica_ids=serving, reason=reason))
        if starting:
            self._actions.append(Stop(replica_ids=starting, reason=reason))


def _shares(group: GroupPlan, base: BaseModelId) -> tuple[AdapterShare, ...]:
    return next(placed.adapters for placed in group.bases if placed.base_model_id == base)
