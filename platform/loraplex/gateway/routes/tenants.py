"""/v1/tenants, their keys and usage: for the admin role only."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from loraplex.core.control import ControlPlane
from loraplex.core.errors import NotFound
from loraplex.core.ids import TenantName
from loraplex.core.tenant import LIMIT_NAMES, MAX_WEIGHT, KeyView, Role, TenantLimits, TenantView
from loraplex.gateway.checks import check_text
from loraplex.gateway.directory import Directory
from loraplex.gateway.routes import replies
from loraplex.gateway.routes.access import Caller
from loraplex.gateway.routes.json_reply import json_list, json_reply
from loraplex.gateway.service import GatewayService

Limit = Annotated[int, Field(ge=0, le=2**53)]


class LimitsBody(BaseModel):
    """null means unlimited, and weight 1; in a change, a limit that is not named stays as it is."""

    model_config = ConfigDict(strict=True, extra="forbid")

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_concurrent_requests: Limit | None = None
    max_adapters: Limit | None = None
    max_adapter_bytes: Limit | None = None
    weight: Annotated[int, Field(ge=1, le=MAX_WEIGHT)] | None = None

    def over(self, limits: TenantLimits) -> TenantLimits:
        """``limits`` with those replaced that the client named."""
        values = {name: getattr(limits, name) for name in LIMIT_NAMES}
        values.update(self.model_dump(exclude_unset=True))
        return TenantLimits(**values)


class CreateTenantRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=63)]
    limits: LimitsBody = Field(default_factory=LimitsBody)


class UpdateTenantRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    limits: LimitsBody


class CreateKeyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Role = Role.MEMBER


def tenant_reply(tenant: TenantView) -> dict[str, Any]:
    """Shaped as ``replies.TenantReply``."""
    return {
        "id": tenant.name,
        "object": "tenant",
        "name": tenant.name,
        "limits": {name: getattr(tenant.limits, name) for name in LIMIT_NAMES},
        "num_adapters": tenant.num_adapters,
        "adapter_bytes": tenant.adapter_bytes,
    }


def key_reply(key: KeyView) -> dict[str, Any]:
    """Shaped as ``replies.KeyReply``."""
    return {
        "id": key.key_id,
        "object": "key",
        "tenant": key.tenant,
        "role": key.role.value,
        "created": int(key.created_s),
    }


async def _require_admin(caller: Caller) -> None:
    caller.require_admin()


def tenant_routes(service: GatewayService, control: ControlPlane) -> APIRouter:
    router = APIRouter(
        prefix="/v1/tenants",
        tags=["administration"],
        responses=replies.CHANGE_ERRORS,
        dependencies=[Depends(_require_admin)],
    )
    view = service.view
    wait_s = service.config.visibility_wait_s

    @router.get("", response_model=replies.TenantList)
    async def list_tenants() -> Response:
        return json_list([tenant_reply(tenant) for tenant in view.directory.tenants()])

    @router.post("", status_code=201, response_model=replies.TenantReply)
    async def create_tenant(body: CreateTenantRequest) -> Response:
        tenant = await control.create_tenant(check_text(body.name, param="name"), body.limits.over(TenantLimits()))
        await view.wait_for(lambda directory: _has_tenant(directory, tenant.name), timeout_s=wait_s)
        return json_reply(tenant_reply(tenant), status=201)

    @router.get("/{tenant}", response_model=replies.TenantReply)
    async def get_tenant(tenant: str) -> Response:
        return json_reply(tenant_reply(view.directory.tenant(tenant)))

    @router.patch("/{tenant}", response_model=replies.TenantReply)
    async def update_tenant(tenant: str, body: UpdateTenantRequest) -> Response:
        limits = body.limits.over(view.directory.tenant(tenant).limits)
        changed = await control.update_tenant(TenantName(tenant), limits)

        def seen(directory: Directory) -> bool:
            return _has_tenant(directory, changed.name) and directory.tenant(changed.name).limits == changed.limits

        await view.wait_for(seen, timeout_s=wait_s)
        return json_reply(tenant_reply(changed))

    @router.delete("/{tenant}", response_model=replies.DeletedReply)
    async def delete_tenant(tenant: str) -> Response:
        name = view.directory.tenant(tenant).name
        await control.delete_tenant(name)
        await view.wait_for(lambda directory: not _has_tenant(directory, name), timeout_s=wait_s)
        return json_reply({"id": name, "object": "tenant", "deleted": True})

    @router.get("/{tenant}/keys", response_model=replies.KeyList)
    async def list_keys(tenant: str) -> Response:
        directory = view.directory
        return json_list([key_reply(key) for key in directory.keys(directory.tenant(tenant))])

    @router.post("/{tenant}/keys", status_code=201, response_model=replies.NewKeyReply)
    async def create_key(tenant: str, body: CreateKeyRequest) -> Response:
        owner = view.directory.tenant(tenant)
        made = await control.create_key(owner.name, body.role)
        await view.wait_for(lambda directory: _has_key(directory, owner, made.view.key_id), timeout_s=wait_s)
        return json_reply({**key_reply(made.view), "key": made.key}, status=201)

    @router.delete("/{tenant}/keys/{key_id}", response_model=replies.DeletedReply)
    async def delete_key(tenant: str, key_id: str) -> Response:
        owner = view.directory.tenant(tenant)
        await control.delete_key(owner.name, check_text(key_id, param="key_id"))
        await view.wait_for(lambda directory: not _has_key(directory, owner, key_id), timeout_s=wait_s)
        return json_reply({"id": key_id, "object": "key", "deleted": True})

    @router.get("/{tenant}/usage", response_model=replies.TenantUsageReply)
    async def get_usage(tenant: str) -> Response:
        usage = await control.usage(view.directory.tenant(tenant).name)
        return json_reply(
            {
                "object": "usage",
                "tenant": usage.tenant,
                "requests": usage.requests,
                "prompt_tokens": usage.prompt_tokens,
                "output_tokens": usage.output_tokens,
            }
        )

    return router


def _has_tenant(directory: Directory, name: str) -> bool:
    try:
        directory.tenant(name)
    except NotFound:
        return False
    return True


def _has_key(directory: Directory, tenant: TenantView, key_id: str) -> bool:
    return any(key.key_id == key_id for key in directory.keys(tenant))
