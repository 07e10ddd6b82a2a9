"""How far the running cluster is on its way to a plan, and what was decided: what the control plane tells of plans.

Written by ``controller``, shown by the gateway's admin routes and the command ``plan``.
"""

from dataclasses import dataclass
from enum import StrEnum

from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import AdapterShare, Plan, Shape


class PlanState(StrEnum):
    PROPOSED = "proposed"
    """Waits for an administrator."""
    APPLYING = "applying"
    """The cluster moves towards it."""
    SETTLED = "settled"
    """The cluster is as it says."""
    FAILED = "failed"
    """One of its groups could not be started; the plan before it is in force again."""
    REPLACED = "replaced"
    """By a later one; or proposed and not taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    plan: Plan
    """Version 0: the config's own, which is in force when no other is."""
    source: str
    """Who or what made it: ``config``, ``admin``, ``planner``, ``rollback to 3``."""
    state: PlanState
    created_s: float
    """Wall clock, Unix seconds."""
    reason: str = ""
    """Why it was made, or why it failed."""


class DecisionKind(StrEnum):
    APPLIED = "applied"
    ROLLED_BACK = "rolled back"
    SETTLED = "settled"
    FAILED = "failed"
    PROPOSED = "proposed"
    KEPT = "kept"
    """The planner found nothing that is worth the move, or could not plan."""
    REASSIGNED = "reassigned"
    """Adapters moved among running replicas."""
    NOT_RESIDENT = "not resident"
    """Adapters could not be loaded ahead; requests load them."""
    REPLACED_REPLICA = "replaced replica"
    WOKEN = "woken"
    ASLEEP = "asleep"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRecord:
    number: int
    """Grows by one."""
    at_s: float
    """Wall clock, Unix seconds."""
    kind: DecisionKind
    plan_version: int
    """In force, or the one that is decided about."""
    reason: str
    attainment_before: float | None = None
    """Measured over the window before; None: nothing was measured."""
    predicted_gain: float | None = None
    """Attainment that the planner expects to win, its move paid; of what others decided, what the simulator says by the
    recorded traffic, once it has said it. None: no cost profiles are configured, or nothing was recorded."""
    attainment_after: float | None = None
    """Measured over a window of the same length once the change had settled."""


class GroupState(StrEnum):
    SERVING = "serving"
    STARTING = "starting"
    WAITING = "waiting"
    """For GPUs that others still hold, or for the next attempt."""
    LEFT_OUT = "left out"
    """The nodes that are up have no GPUs for it."""
    LEAVING = "leaving"
    """Of no plan any more; ends when its requests have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    replica_id: ReplicaId
    base_model_id: BaseModelId
    state: str
    """``starting``, ``serving``, ``draining`` or ``stopping``."""
    adapters: tuple[AdapterShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    name: str
    """In the plan; empty for one that is leaving."""
    group: str
    """Of the replicas that are this group now; empty: there are none."""
    bases: tuple[BaseModelId, ...]
    shape: Shape
    gpu: str
    nodes: tuple[str, ...]
    """Where its ranks are; empty: not known."""
    state: GroupState
    reason: str
    """Why it is not serving; empty when it is."""
    replicas: tuple[ReplicaStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    mode: str
    """``auto``, ``propose`` or ``off``."""
    active: PlanRecord
    settled: bool
    groups: tuple[GroupStatus, ...]
    """Of the plan, in its order, then woken ones, then those that leave."""
    problem: str
    """Why nothing moves at the moment (database away, replaced by another controller); usually empty."""
    num_outdated: int = 0
    """Replicas of another build or config than the controller's, which are replaced one by one."""
    attainment: float | None = None
    """Share of the requests of the planning window that met all targets; None: there were none."""
