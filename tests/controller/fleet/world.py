"""A controller with its real database over machines in memory, and plans written short."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from loraplex.controller.config import ControllerConfig, ControllerOptions
from loraplex.controller.controller import Controller
from loraplex.controller.fleet.config import FleetConfig
from loraplex.controller.fleet.manager import FleetManager
from loraplex.controller.fleet.state import FleetBase
from loraplex.core.control import BaseModelView, ControlSnapshot, ReplicaRoute
from loraplex.core.fleet import NodeStatus
from loraplex.core.ids import BaseModelId, TenantName
from loraplex.core.plan import AdapterShare, BasePlacement, GroupPlan, Plan, Shape
from loraplex.core.tenant import TenantLimits
from loraplex.database.config import DatabaseConfig
from loraplex.registry.config import RegistryConfig
from loraplex.tenancy import TenancyConfig
from loraplex.testing.fake_actuator import FakeActuator
from loraplex.testing.tiny_adapter import tiny_adapter, tiny_model
from loraplex.testing.tiny_controller import upload_adapter

A, B, C = BaseModelId("a"), BaseModelId("b"), BaseModelId("c")
BASES = {base: FleetBase(base_model_id=base, gpu="") for base in (A, B, C)}
QUICK = FleetConfig(
    tick_s=0.01,
    drain_quiet_s=0.0,
    drain_timeout_s=5.0,
    retry_first_s=0.01,
    retry_max_s=0.05,
    stable_s=1000.0,
    node_hold_s=0.05,
    node_max_hold_s=0.2,
)


def group(
    name: str, *bases: BaseModelId, tp: int = 1, gpu: str = "", nodes: Iterable[str] = (), adapters: Iterable[str] = ()
) -> GroupPlan:
    """``adapters`` lie on each of its bases."""
    shares = tuple(AdapterShare(tenant="acme", name=adapter) for adapter in adapters)
    return GroupPlan(
        name=name,
        shape=Shape(tp=tp),
        bases=tuple(BasePlacement(base_model_id=base, adapters=shares) for base in bases),
        gpu=gpu,
        nodes=tuple(nodes),
    )


def plan(version: int, *groups: GroupPlan) -> Plan:
    return Plan(version=version, groups=groups)


def node(name: str, num_gpus: int, gpu: str = "g") -> NodeStatus:
    return NodeStatus(name=name, gpu=gpu, num_gpus=num_gpus)


@dataclass
class Fleet:
    """Machines and a data directory that outlive their controllers."""

    data_dir: Path
    machines: FakeActuator
    default: Plan
    config: FleetConfig = QUICK
    database_url: str | None = None
    controller: Controller = field(init=False)
    manager: FleetManager = field(init=False)

    async def start(self) -> FleetManager:
        """A controller; one before it is not stopped."""
        options = ControllerOptions(
            data_dir=self.data_dir,
            controller=ControllerConfig(fleet=self.config, database=DatabaseConfig(url=self.database_url)),
            registry=RegistryConfig(),
            tenancy=TenancyConfig(),
        )
        self.controller = Controller(options, trace_sink=None)  # type: ignore[arg-type]
        await self.controller.start()
        view = BaseModelView(base_model_id=A, directory="/tiny", max_context_tokens=64, created_s=0.0)
        await self.controller.set_base_models((view,), {A: tiny_model(A, max_context_tokens=64)})
        self.manager = await self.controller.run_fleet(
            self.machines, loads=self.machines.load, bases=BASES, default_plan=self.default
        )
        return self.manager

    async def register(self, *names: str) -> None:
        """Adapters of tenant acme."""
        await self.controller.ensure_tenant("acme", TenantLimits())
        for seed, name in enumerate(names):
            await upload_adapter(self.controller, TenantName("acme"), name, tiny_adapter(seed))

    async def snapshot(self) -> ControlSnapshot:
        snapshot = await self.controller.snapshot(after_epoch=0, after_version=0, timeout_s=0)
        assert snapshot is not None
        return snapshot

    async def routes(self) -> dict[str, ReplicaRoute]:
        return {route.replica_id: route for route in (await self.snapshot()).routes}

    async def eventually(self, check: Callable[[], object], *, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not check():  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.005)
        self.machines.validate()
        self.manager.validate()

    async def settled(self, *, timeout_s: float = 10.0) -> None:
        await self.eventually(lambda: self.manager.status().settled, timeout_s=timeout_s)

    def shown(self) -> list[tuple[str, int, tuple[str, ...], tuple[str, ...]]]:
        """(Bases, tp, nodes, adapters) of each group that is up on the machines, sorted."""
        found: dict[str, list[object]] = {}
        for target in self.machines.up().values():
            names = tuple(sorted(share.name for share in target.adapters))
            entry = found.setdefault(target.group, ["", target.shape.tp, tuple(sorted(target.nodes)), names])
            entry[0] = "+".join(sorted([*filter(None, str(entry[0]).split("+")), target.base_model_id]))
        return sorted(tuple(entry) for entry in found.values())  # type: ignore[misc]


def changed(config: FleetConfig, changes: dict[str, object]) -> FleetConfig:
    return FleetConfig(**{name: getattr(config, name) for name in config.__struct_fields__} | changes)  # type: ignore[arg-type]
