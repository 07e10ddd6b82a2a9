"""The controller's commands on a Ray of several nodes: placement, adoption, deaths, epochs."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psutil
import pytest
import ray
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.control import AdapterView, ReplicaRoute
from loraplex.core.errors import Unavailable
from loraplex.core.fleet import NodeStatus, ReplicaTarget
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import Shape
from loraplex_deployments.actuator import RayActuator, remove_all_replicas
from loraplex_deployments.control_client import CONTROLLER_NAME, NAMESPACE
from loraplex_deployments.local_cluster import LocalCluster
from loraplex_deployments.placement import Nodes, reserved_groups
from loraplex_deployments.replica_handles import find_replica
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state

from tests.deployments.own_process import OwnProcess

pytestmark = pytest.mark.ray

_CONFIG = """
data_dir: {root}
base_models:
  - {{id: small, model: "random:tiny-llama", num_gpus: 1, executor: {{num_pages: 64}}}}
  - {{id: other, model: "random:tiny-qwen2", num_gpus: 1, executor: {{num_pages: 64}}}}
  - {{id: broken, model: "{root}/missing", num_gpus: 1}}
  - {{id: paced, model: "random:tiny-llama", num_gpus: 1, executor: {{num_pages: 64}}, paced: {{}}}}
"""
_SECRET = "secret"


class World:
    """What lives in the process of the cluster."""

    cluster: LocalCluster
    config: PlatformConfig
    artifacts: Any


def start_world(root: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    World.config = parse_platform_config(_CONFIG.format(root=root), source="test")
    World.cluster = LocalCluster(head_cpus=2)
    World.cluster.add_node("one", num_cpus=4, num_gpus=2, accelerator="H100")
    World.cluster.add_node("two", num_cpus=4, num_gpus=1, accelerator="A100")
    ray.init(address=World.cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")

    # Replicas want to know where their adapters come from; they ask for none here.
    World.artifacts = ray.remote(num_cpus=0)(Artifacts).options(name=CONTROLLER_NAME, lifetime="detached").remote()


class Artifacts:
    pass


def end_world() -> None:
    remove_all_replicas(_SECRET)
    World.cluster.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnProcess]:
    process = OwnProcess(start_world, str(tmp_path_factory.mktemp("actuator")))
    yield process
    process.close(end_world)


async def no_adapters() -> tuple[AdapterView, ...]:
    return ()


def actuator() -> RayActuator:
    return RayActuator(World.config, cluster_secret=_SECRET, adapters=no_adapters)


def target(name: str, *, base: str = "small", group: str | None = None, **more: Any) -> ReplicaTarget:
    return ReplicaTarget(
        replica_id=ReplicaId(name),
        group=group or f"group-of-{name}",
        base_model_id=BaseModelId(base),
        shape=more.pop("shape", Shape()),
        **more,
    )


def run(check: Callable[[RayActuator], Awaitable[None]]) -> None:
    """Leaves nothing behind."""
    try:
        asyncio.run(check(actuator()))  # type: ignore[arg-type]
    finally:
        remove_all_replicas(_SECRET)


def gpus_in_use() -> dict[str, tuple[str, ...]]:
    """Group -> nodes."""
    known = Nodes({})
    return {group: tuple(map(known.name, node_ids)) for group, node_ids in reserved_groups().items()}


def pid_of(replica_id: str) -> int:
    found = find_replica(ReplicaId(replica_id))
    assert found is not None
    return int(ray.get(found[1].__ray_call__.remote(lambda _actor: os.getpid())))


def test_nodes_have_names_and_gpu_types(world: OwnProcess) -> None:
    assert world.call(see_nodes) == (
        NodeStatus(name="head", gpu="", num_gpus=0),
        NodeStatus(name="one", gpu="h100-80gb", num_gpus=2),
        NodeStatus(name="two", gpu="A100", num_gpus=1),
    )


def see_nodes() -> tuple[NodeStatus, ...]:
    return asyncio.run(actuator().nodes())


def test_a_group_lies_where_the_plan_says_and_its_bases_share_it(world: OwnProcess) -> None:
    world.call(run, place)


async def place(machines: RayActuator) -> None:
    routes = await asyncio.gather(
        machines.start(target("a", group="shared", nodes=("two",), gpu="A100"), epoch=1),
        machines.start(target("b", group="shared", nodes=("two",), gpu="A100", base="other"), epoch=1),
        machines.start(target("c", gpu="h100-80gb"), epoch=1),
    )
    assert isinstance(routes[0], ReplicaRoute)
    assert (routes[0].group, routes[0].gpu, routes[1].base_model_id) == ("shared", "A100", "other")
    assert len({route.address for route in routes}) == 3
    running = {replica.replica_id: replica for replica in await machines.running()}
    assert {name: replica.nodes for name, replica in running.items()} == {"a": ("two",), "b": ("two",), "c": ("one",)}
    await machines.stop(ReplicaId("a"), epoch=1)
    assert set(gpus_in_use()) == {"shared", "group-of-c"}, "the other base still runs there"
    await machines.stop(ReplicaId("b"), epoch=1)
    await machines.stop(ReplicaId("b"), epoch=1)
    assert set(gpus_in_use()) == {"group-of-c"}


def test_a_later_controller_adopts_what_runs_and_an_earlier_one_is_refused(world: OwnProcess) -> None:
    world.call(run, adopt)


async def adopt(older: RayActuator) -> None:
    route = await older.start(target("a"), epoch=1)
    pid = pid_of("a")
    later = actuator()
    assert [replica.replica_id for replica in await later.running()] == ["a"]
    assert await later.start(target("a"), epoch=2) == route
    assert pid_of("a") == pid
    for command in (
        older.start(target("b"), epoch=1),
        older.assign(target("a"), epoch=1),
        older.stop(ReplicaId("a"), epoch=1),
    ):
        with pytest.raises(Unavailable) as refused:
            await command
        assert refused.value.code == "superseded"
    # The replica itself refuses as well, should the register have been read a moment too early.
    found = find_replica(ReplicaId("a"))
    assert found is not None
    with pytest.raises(Unavailable, match="epoch 1"):
        await found[1].hear.remote(1)
    await later.stop(ReplicaId("a"), epoch=2)
    assert await later.running() == ()


def test_deaths_are_told_soon(world: OwnProcess) -> None:
    world.call(run, die)


async def die(machines: RayActuator) -> None:
    World.cluster.add_node("fragile", num_cpus=2, num_gpus=1)
    await asyncio.gather(machines.start(target("a"), epoch=1), machines.start(target("b", nodes=("fragile",)), epoch=1))
    deaths = [asyncio.create_task(machines.wait_stopped(ReplicaId(name))) for name in "ab"]
    await asyncio.sleep(0.5)
    psutil.Process(pid_of("a")).kill()
    await told(deaths[0], within_s=1)
    assert not deaths[1].done()
    await asyncio.to_thread(World.cluster.kill_node, "fragile")
    await told(deaths[1], within_s=3)
    assert "fragile" not in {node.name for node in await machines.nodes()}, "Ray notices only much later"
    for name in "ab":
        await machines.stop(ReplicaId(name), epoch=1)
    assert gpus_in_use() == {}, "others may have them now"
    assert await machines.wait_stopped(ReplicaId("a")) == "it does not run"


async def told(death: asyncio.Task[str], *, within_s: float) -> None:
    begun_s = time.monotonic()
    assert await death
    assert time.monotonic() - begun_s < within_s


def test_what_cannot_start_says_why_and_holds_nothing(world: OwnProcess) -> None:
    world.call(run, fail)


async def fail(machines: RayActuator) -> None:
    for wrong, reason in (
        (target("a", base="broken"), "missing"),
        (target("a", base="unknown"), "no base model unknown"),
        (target("a", shape=Shape(pp=3)), "2 layers are too few"),
        (target("a", nodes=("nowhere",)), "node nowhere is not up"),
    ):
        with pytest.raises(Unavailable, match=reason):
            await machines.start(wrong, epoch=1)
    assert gpus_in_use() == {}


def test_a_replica_waits_for_room_until_there_is_some_or_it_is_stopped(world: OwnProcess) -> None:
    world.call(run, wait_for_room)


async def wait_for_room(machines: RayActuator) -> None:
    wide = target("wide", base="paced", shape=Shape(tp=2))
    route = await machines.start(wide, epoch=1)
    assert route.shape == Shape(tp=2)
    assert gpus_in_use() == {"group-of-wide": ("one", "one")}
    next_one = asyncio.create_task(machines.start(target("next", nodes=("one",)), epoch=1))
    never = asyncio.create_task(machines.start(target("never", nodes=("one",)), epoch=1))
    await asyncio.sleep(1)
    assert not next_one.done()
    assert len(await machines.running()) == 1
    assert set(gpus_in_use()) == {"group-of-wide", "group-of-next", "group-of-never"}, "they wait in line"
    await machines.stop(ReplicaId("never"), epoch=1)
    with pytest.raises(Unavailable, match="stopped"):
        await never
    await machines.stop(ReplicaId("wide"), epoch=1)
    await next_one
    assert gpus_in_use() == {"group-of-next": ("one",)}


def test_what_waits_for_a_node_that_does_not_exist_is_the_autoscalers_demand(world: OwnProcess) -> None:
    world.call(run, demand)


async def demand(machines: RayActuator) -> None:
    waiting = asyncio.create_task(machines.start(target("a", base="paced", shape=Shape(tp=2), gpu="B200"), epoch=1))
    deadline_s = time.monotonic() + 30
    while not (bundles := asked_for()):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.2)
    assert bundles == [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:B200": 0.001}] * 2
    await machines.stop(ReplicaId("a"), epoch=1)
    with pytest.raises(Unavailable, match="stopped"):
        await waiting


def asked_for() -> list[dict[str, float]]:
    """Bundles that Ray's autoscaler sees and no node holds."""
    state = get_cluster_resource_state(GcsClient(World.cluster.address))
    return [
        dict(request.resources_bundle) for gang in state.pending_gang_resource_requests for request in gang.requests
    ]


def test_gpus_that_a_dead_controller_had_only_reserved_are_freed(world: OwnProcess) -> None:
    world.call(run, reserve_only)


async def reserve_only(machines: RayActuator) -> None:
    await machines.start(target("a", nodes=("two",)), epoch=1)
    abandoned = asyncio.create_task(machines.start(target("b", nodes=("two",)), epoch=1))
    await asyncio.sleep(1)
    abandoned.cancel()
    assert set(gpus_in_use()) == {"group-of-a", "group-of-b"}
    await actuator().running()
    assert set(gpus_in_use()) == {"group-of-a"}
