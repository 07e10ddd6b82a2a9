"""What tests of the controller ask of it."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from loraplex.controller.config import ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.core.control import ControlPlane, ControlSnapshot
from loraplex.core.ids import GatewayId, TenantName
from loraplex.core.tenant import TenantLimits
from loraplex.testing.tiny_controller import upload_adapter

ACME, GLOBEX = TenantName("acme"), TenantName("globex")
GATEWAY = GatewayId("gateway-1")
upload = partial(upload_adapter, piece_bytes=500)


async def newest(control: ControlPlane) -> ControlSnapshot:
    snapshot = await control.snapshot(after_epoch=0, after_version=0, timeout_s=0)
    assert snapshot is not None
    return snapshot


async def tenants(controller: Controller, **limits: int) -> None:
    for name in (ACME, GLOBEX):
        await controller.create_tenant(name, TenantLimits(**limits))


def with_database(options: ControllerOptions, **changes: Any) -> ControllerOptions:
    database = msgspec.structs.replace(options.controller.database, **changes)
    return replace(options, controller=msgspec.structs.replace(options.controller, database=database))


def stored_files(options: ControllerOptions) -> list[Path]:
    return [path for path in (options.data_dir / "artifacts").rglob("*") if path.is_file()]
