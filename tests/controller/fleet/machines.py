"""Machines in memory: they carry out what was decided, and hold it to the GPUs that there are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from loraplex.controller.fleet.diff import Assign, Decided, Drain, Observed, StartReplicas, Stop, TakeBack, decide
from loraplex.controller.fleet.placing import Placer
from loraplex.controller.fleet.state import Kind, Replica, ReplicaState, base_shares, running_groups
from loraplex.core.control import ReplicaRoute
from loraplex.core.fleet import NodeStatus, ReplicaTarget
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import GroupPlan

from tests.controller.fleet.world import BASES

MAX_TURNS = 200


class Machines:
    """Carries out actions; what takes time there ends when the test says so."""

    def __init__(self, *nodes: NodeStatus) -> None:
        self.nodes = nodes
        self.replicas: dict[ReplicaId, Replica] = {}
        self.count = 0
        self.placer = Placer(BASES)

    def decide(self, plan: list[GroupPlan], extra: Sequence[GroupPlan] = (), **more: Any) -> Decided:
        observed = self.observed(**more)
        return decide(self.placer.place(plan, extra, observed.replicas, observed.nodes), observed, BASES)

    def observed(self, **more: Any) -> Observed:
        drained = frozenset(i for i, r in self.replicas.items() if r.state is ReplicaState.DRAINING)
        return Observed(replicas=tuple(self.replicas.values()), nodes=self.nodes, drained=drained, **more)

    def act(self, decided: Decided) -> None:
        for action in decided.actions:
            match action:
                case StartReplicas():
                    self.count += 1
                    name = action.group or f"g{self.count}"
                    for base in action.bases:
                        self._start(action, base, name)
                case Assign():
                    self._put(action.replica_id, adapters=action.adapters)
                case Drain():
                    self._move(action.replica_ids, ReplicaState.DRAINING)
                case TakeBack():
                    self._move(action.replica_ids, ReplicaState.SERVING)
                case Stop():
                    self._move(action.replica_ids, ReplicaState.STOPPING)
        self.check_gpus()

    def _start(self, action: StartReplicas, base: BaseModelId, name: str) -> None:
        assert not action.group or all(
            r.target.base_model_id != base for r in self.replicas.values() if r.target.group == name
        ), "a group has one replica of a base"
        self.count += 1
        replica_id = ReplicaId(f"{base}-{self.count}")
        placed = next(one for one in action.plan.bases if one.base_model_id == base)
        self.replicas[replica_id] = Replica(
            target=ReplicaTarget(
                replica_id=replica_id,
                group=name,
                base_model_id=base,
                shape=action.plan.shape,
                gpu=action.plan.gpu,
                nodes=action.nodes,
                adapters=placed.adapters,
                bases=base_shares(action.plan),
            ),
            state=ReplicaState.STARTING,
            since_s=0.0,
            group_bases=tuple(one.base_model_id for one in action.plan.bases),
            planned_nodes=action.planned_nodes,
        )

    def _put(self, replica_id: ReplicaId, **changes: Any) -> None:
        replica = self.replicas[replica_id]
        self.replicas[replica_id] = replace(replica, target=replace(replica.target, **changes))

    def _move(self, replica_ids: tuple[ReplicaId, ...], state: ReplicaState) -> None:
        for replica_id in replica_ids:
            self.replicas[replica_id] = replace(self.replicas[replica_id], state=state)

    def advance(self, choose: Any) -> None:
        """One of the things under way ends: a start, a stop, or a replica."""
        busy = [r for r in self.replicas.values() if r.state in (ReplicaState.STARTING, ReplicaState.STOPPING)]
        if not busy:
            return
        replica = choose(busy)
        if replica.state is ReplicaState.STOPPING:
            del self.replicas[replica.target.replica_id]
        else:
            route = ReplicaRoute(
                replica_id=replica.target.replica_id, base_model_id=replica.target.base_model_id, address="x:1"
            )
            self.replicas[replica.target.replica_id] = replace(replica, state=ReplicaState.SERVING, route=route)

    def kill(self, replica_id: ReplicaId) -> None:
        self._move((replica_id,), ReplicaState.STOPPING)

    def check_gpus(self) -> None:
        used = Counter(name for one in running_groups(self.replicas.values()) for name in one.nodes)
        for one in self.nodes:
            assert used[one.name] <= one.num_gpus, f"{one.name} gives more than it has"

    def serving(self) -> Counter[BaseModelId]:
        return Counter(r.target.base_model_id for r in self.replicas.values() if r.state is ReplicaState.SERVING)

    def reach(self, plan: list[GroupPlan], choose: Any) -> int:
        """Turns until all is as planned."""
        for turn in range(MAX_TURNS):
            decided = self.decide(plan)
            self.act(decided)
            if decided.settled:
                self.check_reached(plan)
                return turn
            self.advance(choose)
        pytest.fail(f"not there after {MAX_TURNS} turns: {decided.actions}, left out {decided.left_out}")

    def check_reached(self, plan: list[GroupPlan]) -> None:
        found = Counter(
            (one.shape, tuple(sorted((m.target.base_model_id, m.target.adapters) for m in one.members)))
            for one in running_groups(self.replicas.values())
        )
        assert found == Counter(
            (one.shape, tuple(sorted((p.base_model_id, p.adapters) for p in one.bases))) for one in plan
        )
        for one in plan:
            if one.nodes:
                assert any(
                    sorted(g.nodes) == sorted(one.nodes) and g.bases == Kind.of(one).bases
                    for g in running_groups(self.replicas.values())
                )
