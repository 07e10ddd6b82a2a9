"""ControlPlane over Ray: one call of the controller actor per method, its errors unwrapped to ours.

Used by gateways, replicas and the launcher. Holds no state but the actor handle; Ray restarts the controller and
retries go to the new one, likewise if it died for good and another was created. While it is away,
every call raises Unavailable; reads of artifacts wait for it first.
"""

import asyncio
import time
from typing import Any, cast

import ray
from loraplex.core.control import (
    AdapterView,
    ArtifactInfo,
    ControlSnapshot,
    NewKey,
    QuotaShare,
    TenantDemand,
    TraceStoreStatus,
)
from loraplex.core.control_wire import decode_answer, encode_request
from loraplex.core.errors import LoraplexError, Unavailable
from loraplex.core.ids import BaseModelId, Digest, GatewayId, TenantName
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionRecord, FleetStatus, PlanRecord
from loraplex.core.tenant import Role, TenantLimits, TenantView, UsageRow
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError

NAMESPACE = "loraplex"
CONTROLLER_NAME = "loraplex-controller"
_READ_TIMEOUT_S = 30.0
_AWAY_S, _AWAY_PAUSE_S = 10.0, 0.2


def controller_handle() -> Any:
    """The controller actor of this cluster. Raises Unavailable when there is none."""
    try:
        return ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    except ValueError:
        raise Unavailable("no loraplex controller runs on this Ray cluster") from None


def unwrap(error: Exception) -> Exception:
    """Ray's envelope -> the error that the remote side raised, or Unavailable when the actor is away."""
    if not isinstance(error, RayTaskError):
        return Unavailable("the controller is away; try again shortly")
    cause: object = error.cause
    return cause if isinstance(cause, LoraplexError) else error


def _successor(handle: Any) -> Any:
    """Of a controller that is gone for good: the one that was created since, or itself. Blocking."""
    try:
        return controller_handle()
    except Unavailable:
        return handle


class RayControlPlane:
    """Implements ``loraplex.core.control.ControlPlane``."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            answer: bytes = await self._handle.ask.remote(encode_request(method, *args, **kwargs))
            return decode_answer(method, answer)
        except RayError as error:
            if isinstance(error, ActorDiedError):
                self._handle = await asyncio.to_thread(_successor, self._handle)
            raise unwrap(error) from None

    async def snapshot(self, *, after_epoch: int, after_version: int, timeout_s: float) -> ControlSnapshot | None:
        answer = await self._call("snapshot", after_epoch=after_epoch, after_version=after_version, timeout_s=timeout_s)
        return cast("ControlSnapshot | None", answer)

    async def lease_quota(
        self, gateway_id: GatewayId, demand: tuple[TenantDemand, ...], held: tuple[QuotaShare, ...]
    ) -> tuple[QuotaShare, ...]:
        return cast(tuple[QuotaShare, ...], await self._call("lease_quota", gateway_id, demand, held))

    async def report_usage(self, gateway_id: GatewayId, rows: tuple[UsageRow, ...]) -> None:
        await self._call("report_usage", gateway_id, rows)

    async def record_traces(self, gateway_id: GatewayId, batch: bytes) -> TraceStoreStatus:
        return cast(TraceStoreStatus, await self._call("record_traces", gateway_id, batch))

    async def artifact(self, digest: Digest) -> ArtifactInfo:
        return cast(ArtifactInfo, await self._call("artifact", digest))

    async def read_artifact(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        return cast(bytes, await self._call("read_artifact", digest, offset=offset, max_bytes=max_bytes))

    async def begin_upload(self, tenant: TenantName, name: str) -> str:
        return cast(str, await self._call("begin_upload", tenant, name))

    async def append_upload(self, upload_id: str, filename: str, data: bytes) -> None:
        await self._call("append_upload", upload_id, filename, data)

    async def commit_upload(self, upload_id: str) -> AdapterView:
        return cast(AdapterView, await self._call("commit_upload", upload_id))

    async def abort_upload(self, upload_id: str) -> None:
        await self._call("abort_upload", upload_id)

    async def register_url(self, tenant: TenantName, name: str, url: str) -> AdapterView:
        return cast(AdapterView, await self._call("register_url", tenant, name, url))

    async def set_current(self, tenant: TenantName, name: str, version: int) -> AdapterView:
        return cast(AdapterView, await self._call("set_current", tenant, name, version))

    async def delete_adapter(self, tenant: TenantName, name: str, version: int | None) -> None:
        await self._call("delete_adapter", tenant, name, version)

    async def apply_plan(self, plan: Plan, *, renumber: bool) -> PlanRecord:
        return cast(PlanRecord, await self._call("apply_plan", plan, renumber=renumber))

    async def accept_plan(self, version: int) -> PlanRecord:
        return cast(PlanRecord, await self._call("accept_plan", version))

    async def rollback_plan(self, version: int | None) -> PlanRecord:
        return cast(PlanRecord, await self._call("rollback_plan", version))

    async def plan_record(self, version: int | None) -> PlanRecord:
        return cast(PlanRecord, await self._call("plan_record", version))

    async def plan_history(self, limit: int) -> tuple[PlanRecord, ...]:
        return cast(tuple[PlanRecord, ...], await self._call("plan_history", limit))

    async def decisions(self, limit: int) -> tuple[DecisionRecord, ...]:
        return cast(tuple[DecisionRecord, ...], await self._call("decisions", limit))

    async def fleet_status(self) -> FleetStatus:
        return cast(FleetStatus, await self._call("fleet_status"))

    async def create_tenant(self, name: str, limits: TenantLimits) -> TenantView:
        return cast(TenantView, await self._call("create_tenant", name, limits))

    async def update_tenant(self, name: TenantName, limits: TenantLimits) -> TenantView:
        return cast(TenantView, await self._call("update_tenant", name, limits))

    async def delete_tenant(self, name: TenantName) -> None:
        await self._call("delete_tenant", name)

    async def create_key(self, tenant: TenantName, role: Role) -> NewKey:
        return cast(NewKey, await self._call("create_key", tenant, role))

    async def delete_key(self, tenant: TenantName, key_id: str) -> None:
        await self._call("delete_key", tenant, key_id)

    async def usage(self, tenant: TenantName) -> UsageRow:
        return cast(UsageRow, await self._call("usage", tenant))

    async def wake_base(self, base_model_id: BaseModelId) -> None:
        await self._call("wake_base", base_model_id)


class RayArtifactReader:
    """Blocking reads of artifacts for a replica's staging threads. A controller that is being replaced or restarted is
    waited for, since a request waits for the adapter: for ``_AWAY_S``."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        deadline_s = time.monotonic() + _AWAY_S
        while True:
            try:
                asked = self._handle.ask.remote(encode_request(method, *args, **kwargs))
                return decode_answer(method, ray.get(asked, timeout=_READ_TIMEOUT_S))
            except GetTimeoutError:
                raise Unavailable("the controller did not answer in time") from None
            except RayError as error:
                if isinstance(error, RayTaskError) or time.monotonic() > deadline_s:
                    raise unwrap(error) from None
                if isinstance(error, ActorDiedError):
                    self._handle = _successor(self._handle)
            time.sleep(_AWAY_PAUSE_S)

    def info(self, digest: Digest) -> ArtifactInfo:
        return cast(ArtifactInfo, self._call("artifact", digest))

    def read(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        return cast(bytes, self._call("read_artifact", digest, offset=offset, max_bytes=max_bytes))
