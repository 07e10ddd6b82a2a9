"""What gateways and replicas ask of the controller, and the versioned snapshot that lets them work while it is away.

Implemented in-process by ``controller`` and over Ray by ``loraplex_deployments``.
"""

from dataclasses import dataclass, field
from typing import Protocol

from loraplex.core.adapter import AdapterManifest, AdapterRef
from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId, TenantName
from loraplex.core.plan import AdapterShare, Plan, Shape
from loraplex.core.rollout import DecisionRecord, FleetStatus, PlanRecord
from loraplex.core.tenant import KeyView, Role, TenantLimits, TenantView, UsageRow


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterView:
    """One version of an adapter in the registry."""

    ref: AdapterRef
    base_model_id: BaseModelId
    max_lora_rank: int
    num_bytes: int
    created_s: float
    current: bool
    """True when the bare name points at this version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelView:
    base_model_id: BaseModelId
    directory: str
    """Where tokenizer and config lie (and, except for random weights, the weights)."""
    max_context_tokens: int
    created_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRoute:
    replica_id: ReplicaId
    base_model_id: BaseModelId
    address: str
    """host:port of the replica's stream server."""
    group: str = ""
    """Of the plan: replicas of one group share its GPUs."""
    shape: Shape = field(default_factory=Shape)
    gpu: str = ""
    """GPU type, for the cost model; empty where none is known."""
    adapters: tuple[AdapterShare, ...] = ()
    """That the plan puts here, with weights. Requests of an adapter go to the replicas that list it; of one that no
    replica of its base lists, to any of them."""
    draining: bool = False
    """Takes nothing new; what runs there moves to other replicas when they have room, or ends there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSnapshot:
    epoch: int
    """Grows with each controller; receivers refuse an older one."""
    version: int
    """Grows with each change within an epoch."""
    tenants: tuple[TenantView, ...]
    keys: tuple[KeyView, ...]
    adapters: tuple[AdapterView, ...]
    base_models: tuple[BaseModelView, ...]
    routes: tuple[ReplicaRoute, ...]
    cluster_secret: str
    asleep: bool = False
    """No replica is to run before somebody asks: a request wakes its base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantDemand:
    """What a gateway saw of one tenant in the last slice: offered, whether admitted or refused."""

    tenant: TenantName
    requests: int
    tokens: int
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaShare:
    """The fraction of a tenant's limits that one gateway may spend; shares of one tenant never sum to more than 1."""

    tenant: TenantName
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """The only time that a key is seen in clear."""

    key: str
    view: KeyView


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactInfo:
    manifest: AdapterManifest
    url: str
    """pyarrow.fs URL or local path of the safetensors file."""
    content_sha256: str = ""
    """Lower-case hex, of the file's bytes: what a node checks a copy against (the digest is keyed by a
    tenant secret)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStoreStatus:
    """Rows since the start: received = written + buffered + dropped (repeats are not received twice)."""

    url: str
    received_rows: int
    written_rows: int
    buffered_rows: int
    dropped_rows: int
    repeated_batches: int
    last_error: str | None
    """Why the last write failed; None once writing works again."""


class ControlPlane(Protocol):
    """Every method raises a LoraplexError subclass; Unavailable when the controller is away."""

    async def snapshot(self, *, after_epoch: int, after_version: int, timeout_s: float) -> ControlSnapshot | None:
        """The newest snapshot, as soon as it is newer than (after_epoch, after_version); None after timeout_s."""

    async def lease_quota(
        self, gateway_id: GatewayId, demand: tuple[TenantDemand, ...], held: tuple[QuotaShare, ...]
    ) -> tuple[QuotaShare, ...]:
        """``held``: the last answer, so that a restarted controller knows what the gateways spend; empty at first."""

    async def report_usage(self, gateway_id: GatewayId, rows: tuple[UsageRow, ...]) -> None: ...

    async def record_traces(self, gateway_id: GatewayId, batch: bytes) -> TraceStoreStatus:
        """``batch``: one Arrow IPC stream of the trace schema. Returns how the store stands after it."""

    async def artifact(self, digest: Digest) -> ArtifactInfo: ...

    async def read_artifact(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        """A piece of the safetensors file, for nodes that do not see ``ArtifactInfo.url``. Empty at the end."""

    async def begin_upload(self, tenant: TenantName, name: str) -> str:
        """Opens a staging area; returns its upload id."""

    async def append_upload(self, upload_id: str, filename: str, data: bytes) -> None:
        """``filename``: adapter_config.json or adapter_model.safetensors. PayloadTooLarge past the limits."""

    async def commit_upload(self, upload_id: str) -> AdapterView:
        """Checks and publishes atomically: the new version becomes current. BadAdapter, StorageFull, RateLimited."""

    async def abort_upload(self, upload_id: str) -> None: ...

    async def register_url(self, tenant: TenantName, name: str, url: str) -> AdapterView:
        """Reads a PEFT directory below one of the URL prefixes that the admin approved; PermissionDenied otherwise."""

    async def set_current(self, tenant: TenantName, name: str, version: int) -> AdapterView:
        """Rollback (or forward): moves the alias."""

    async def delete_adapter(self, tenant: TenantName, name: str, version: int | None) -> None:
        """One version, or all. Running requests keep what they hold."""

    async def create_tenant(self, name: str, limits: TenantLimits) -> TenantView: ...

    async def update_tenant(self, name: TenantName, limits: TenantLimits) -> TenantView: ...

    async def delete_tenant(self, name: TenantName) -> None: ...

    async def create_key(self, tenant: TenantName, role: Role) -> NewKey: ...

    async def delete_key(self, tenant: TenantName, key_id: str) -> None: ...

    async def usage(self, tenant: TenantName) -> UsageRow: ...

    async def apply_plan(self, plan: Plan, *, renumber: bool) -> PlanRecord:
        """Puts it in force. InvalidInput when it is not for this cluster; Conflict when its version is not above all
        that there were, unless ``renumber``."""

    async def accept_plan(self, version: int) -> PlanRecord:
        """Puts a proposal of the planner in force. NotFound; Conflict when it is none any more."""

    async def rollback_plan(self, version: int | None) -> PlanRecord:
        """Puts an older plan in force again, under a new version; None: the one before. 0: the config's own."""

    async def plan_record(self, version: int | None) -> PlanRecord:
        """None: the one in force, with its adapters where they are meant to be now. NotFound."""

    async def plan_history(self, limit: int) -> tuple[PlanRecord, ...]:
        """Newest first; the config's own plan is not among them."""

    async def decisions(self, limit: int) -> tuple[DecisionRecord, ...]:
        """Newest first."""

    async def fleet_status(self) -> FleetStatus: ...

    async def wake_base(self, base_model_id: BaseModelId) -> None:
        """A request asks for a base that has no replica: where GPUs are free, one comes. Returns at once. NotFound."""
