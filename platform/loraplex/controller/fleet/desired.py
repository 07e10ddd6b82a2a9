"""What should run: the plan in force, or the config's, and bases that were woken. No I/O."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from loraplex.controller.fleet.checks import check_plan
from loraplex.controller.fleet.nodes import NodeWatch
from loraplex.controller.fleet.state import AdapterKey, FleetBase, Replica, ReplicaState
from loraplex.core.errors import NotFound, Unavailable
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import AdapterShare, BasePlacement, GroupPlan, Plan
from loraplex.core.rollout import PlanRecord, PlanState


class Desired:
    def __init__(
        self,
        default_plan: Plan,
        bases: Mapping[BaseModelId, FleetBase],
        adapters: Callable[[], Collection[AdapterKey]],
        *,
        created_s: float,
    ) -> None:
        self._default = PlanRecord(
            plan=default_plan, source="config", state=PlanState.APPLYING, created_s=created_s, reason=""
        )
        self._bases, self._adapters = bases, adapters
        self.active = self._default
        self.assigned: Plan | None = None
        """The active plan with its adapters moved."""
        self._last_use_s: dict[BaseModelId, float | None] = {}
        """Of woken bases, monotonic; None: not since this controller started."""

    def take(self, active: PlanRecord | None, assigned: Plan | None, woken: Iterable[BaseModelId]) -> None:
        """What was stored."""
        self.activate(active)
        self.assigned = assigned
        self._last_use_s = dict.fromkeys(woken)

    def activate(self, record: PlanRecord | None) -> None:
        """None: the config's."""
        self.active = self._default if record is None else record
        self.assigned = None

    def settled(self) -> None:
        self.active = replace(self.active, state=PlanState.SETTLED)

    @property
    def is_applying(self) -> bool:
        return self.active.state is PlanState.APPLYING

    @property
    def plan(self) -> Plan:
        return self.assigned or self.active.plan

    @property
    def is_nothing(self) -> bool:
        """No group is planned, and no base was woken."""
        return not self.plan.groups and not self._last_use_s

    def groups(self) -> tuple[tuple[GroupPlan, ...], tuple[GroupPlan, ...]]:
        """(Of the plan, woken ones), with the adapters that exist."""
        known = self._adapters()
        names = {name for _, name in known}

        def exists(share: AdapterShare) -> bool:
            return (share.tenant, share.name) in known or (share.tenant is None and share.name in names)

        planned = tuple(
            replace(
                group,
                bases=tuple(
                    replace(placed, adapters=tuple(share for share in placed.adapters if exists(share)))
                    for placed in group.bases
                ),
            )
            for group in self.plan.groups
        )
        return planned, tuple(self._woken_group(base) for base in self._last_use_s if not self._is_planned(base))

    def check(self, plan: Plan, nodes: NodeWatch, *, may_grow: bool) -> None:
        """InvalidInput, or Unavailable while the nodes are not known yet."""
        if not nodes.begun:
            raise Unavailable("the nodes of this cluster are not known yet")
        check_plan(plan, nodes.known(), self._bases, may_grow=may_grow)

    def is_asked_for(self, base: BaseModelId, now_s: float) -> bool:
        """Notes that ``base`` is asked for; True when it must be woken for that. NotFound."""
        if base not in self._bases:
            raise NotFound(f"no base {base}", param="model")
        if base in self._last_use_s:
            self._last_use_s[base] = now_s
            return False
        return not self._is_planned(base)

    def wake(self, base: BaseModelId, now_s: float) -> None:
        self._last_use_s[base] = now_s

    def sleep(self, base: BaseModelId) -> None:
        self._last_use_s.pop(base, None)

    def woken_replicas(self, replicas: Iterable[Replica]) -> list[Replica]:
        return [
            replica
            for replica in replicas
            if replica.target.base_model_id in self._last_use_s and replica.state is ReplicaState.SERVING
        ]

    def idle_bases(
        self, replicas: Iterable[Replica], loads: Mapping[ReplicaId, int], now_s: float, *, idle_s: float
    ) -> list[tuple[BaseModelId, str]]:
        """Woken bases to forget, with the reason; one that still starts is not idle. ``loads``: of the replicas that
        answered."""
        for replica in replicas:
            base = replica.target.base_model_id
            starts = replica.state is ReplicaState.STARTING
            serves = replica.state is ReplicaState.SERVING
            if base in self._last_use_s and (starts or (serves and loads.get(replica.target.replica_id, 1))):
                self._last_use_s[base] = now_s
        found = []
        for base, used_s in self._last_use_s.items():
            if used_s is None:
                self._last_use_s[base] = now_s
            elif self._is_planned(base):
                found.append((base, f"the plan has {base} now"))
            elif now_s - used_s >= idle_s:
                found.append((base, f"no request for {base} in {idle_s:g} s"))
        return found

    def _is_planned(self, base: BaseModelId) -> bool:
        return any(placed.base_model_id == base for group in self.plan.groups for placed in group.bases)

    def _woken_group(self, base: BaseModelId) -> GroupPlan:
        known = self._bases.get(base, FleetBase(base_model_id=base))
        return GroupPlan(
            name=f"woken-{base}", shape=known.shape, gpu=known.gpu, bases=(BasePlacement(base_model_id=base),)
        )
