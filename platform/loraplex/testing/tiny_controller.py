"""Starts the real controller with a tiny base model, tenants, keys and adapters: what a gateway needs to be tried out.

Used by tests and by the gateway's capacity measurement. There is no replica behind its routes.
"""

from collections.abc import Iterable
from pathlib import Path

from loraplex.controller.config import ControllerConfig, ControllerOptions
from loraplex.controller.controller import Controller, TraceSink
from loraplex.controller.fleet.config import FleetConfig
from loraplex.controller.fleet.state import FleetBase
from loraplex.core.control import AdapterView, BaseModelView, ControlPlane, ReplicaRoute, TraceStoreStatus
from loraplex.core.ids import BaseModelId, ReplicaId, TenantName
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.core.tenant import Role, TenantLimits
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy.config import TenancyConfig
from loraplex.testing.fake_actuator import FakeActuator
from loraplex.testing.tiny_adapter import tiny_adapter, tiny_model

TINY_BASE = BaseModelId("tiny-base")


class _NoTraces:
    """Gateways are given a tracer of their own here."""

    def append(self, batch: bytes) -> None:
        raise AssertionError("traces were sent to a controller that keeps none")

    def unwritten(self, since_s: float) -> bytes:
        raise AssertionError("a controller that keeps no traces was asked for them")

    def status(self) -> TraceStoreStatus:
        raise AssertionError("a controller that keeps no traces was asked for them")


async def start_tiny_controller(
    data_dir: Path,
    *,
    tokenizer: Path,
    max_context_tokens: int,
    keys: Iterable[tuple[str, Role, str]],
    adapters: Iterable[tuple[str, str, int]] = (),
    registry: RegistryConfig | None = None,
    machines: FakeActuator | None = None,
    fleet: FleetConfig | None = None,
    trace_sink: TraceSink | None = None,
) -> Controller:
    """``keys``: (tenant, role, key); the tenants are made, without limits. ``adapters``: (tenant, name, seed), each a
    version of its name, the last one current. ``machines``: where plans are carried out, the first of which has one
    group, ``first``; without them there is one fixed route, and no plan. The caller stops the controller."""
    options = ControllerOptions(
        data_dir=data_dir,
        controller=ControllerConfig(fleet=fleet or FleetConfig()),
        registry=registry or RegistryConfig(),
        tenancy=TenancyConfig(),
    )
    controller = Controller(options, trace_sink=trace_sink or _NoTraces())
    await controller.start()
    view = BaseModelView(
        base_model_id=TINY_BASE, directory=str(tokenizer), max_context_tokens=max_context_tokens, created_s=1.0
    )
    await controller.set_base_models((view,), {TINY_BASE: tiny_model(TINY_BASE, max_context_tokens=max_context_tokens)})
    if machines is None:
        await controller.set_route(
            ReplicaRoute(replica_id=ReplicaId("fake-0"), base_model_id=TINY_BASE, address="127.0.0.1:1")
        )
    else:
        first = GroupPlan(name="first", shape=Shape(), bases=(BasePlacement(base_model_id=TINY_BASE),))
        await controller.run_fleet(
            machines,
            loads=machines.load,
            bases={TINY_BASE: FleetBase(base_model_id=TINY_BASE)},
            default_plan=Plan(version=0, groups=(first,)),
        )
    for tenant, role, key in keys:
        await controller.ensure_tenant(tenant, TenantLimits())
        await controller.ensure_key(TenantName(tenant), role, key)
    for tenant, name, seed in adapters:
        await upload_adapter(controller, TenantName(tenant), name, tiny_adapter(seed))
    return controller


async def upload_adapter(
    control: ControlPlane, tenant: TenantName, name: str, files: dict[str, bytes], *, piece_bytes: int = 1024 * 1024
) -> AdapterView:
    """Raises as the controller does."""
    upload_id = await control.begin_upload(tenant, name)
    for filename, data in files.items():
        for start in range(0, len(data), piece_bytes):
            await control.append_upload(upload_id, filename, data[start : start + piece_bytes])
    return await control.commit_upload(upload_id)
