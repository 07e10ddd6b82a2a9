"""Processes and nodes die under open streams, plans change under load, controllers die while they change one.

What has to hold whatever the machine's speed; the times are ``loraplex bench faults`` and ``loraplex bench replan``.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator

import httpx
import pytest
from loraplex.core.plan import Plan
from loraplex.traces.arrivals import read_arrivals
from loraplex_deployments.bench_cluster import BASE, ClusterSetup, node_name
from loraplex_deployments.bench_faults import Fault, FaultOptions, FaultResult, measure_faults
from loraplex_deployments.bench_replan import ReplanBenchResult, ReplanOptions, measure_changes, plan_of, settled

from tests.deployments.bench_world import BenchWorld, bench_world
from tests.deployments.own_process import OwnProcess

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

_NUM_CRASHES = 5


@pytest.fixture(scope="module", params=[1, 3], ids=["1 gateway", "3 gateways"])
def world(request: pytest.FixtureRequest) -> Iterator[OwnProcess]:
    setup = ClusterSetup(nodes=3, gpus_per_node=2, replicas=4, gateways=request.param, adapters=4)
    with bench_world(setup) as process:
        yield process


@pytest.mark.parametrize("fault", [Fault.REPLICA, Fault.NODE, Fault.CONTROLLER, Fault.SERVE_CONTROLLER])
def test_no_stream_breaks_and_all_say_the_same(world: OwnProcess, fault: Fault) -> None:
    result = world.call(kill, fault)
    assert result.unfinished == result.streams, "killed too late to tell anything"
    assert (result.broken, result.errors) == (0, ())
    assert result.identical == result.streams


def test_a_killed_gateway_breaks_its_own_streams_alone(world: OwnProcess) -> None:
    result = world.call(kill, Fault.GATEWAY)
    assert 0 < result.broken == result.affected
    assert (result.affected == result.streams) == (world.call(num_gateways) == 1)
    assert result.broken_elsewhere == 0
    assert result.identical == result.streams - result.broken
    assert result.retried == result.broken


def num_gateways() -> int:
    return BenchWorld.bench.setup.gateways


def kill(fault: Fault) -> FaultResult:
    options = FaultOptions(cluster=BenchWorld.bench.setup, streams=12, output_tokens=400, faults=(fault,))
    (result,) = asyncio.run(measure_faults(BenchWorld.bench, options)).results
    return result


def test_no_request_fails_while_plans_change(world: OwnProcess) -> None:
    result = world.call(replan)
    assert result.requests > 10
    assert (result.failed, result.errors) == (0, {})
    assert len(result.changes) == result.options.changes


def replan() -> ReplanBenchResult:
    return asyncio.run(measure_changes(BenchWorld.bench, replan_options()))


def replan_options() -> ReplanOptions:
    # Without a GPU a replica has one rank, so the groups that become one keep its shape.
    setup = BenchWorld.bench.setup
    return ReplanOptions(cluster=setup, changes=4, requests_per_s=2.0, output_tokens=16, calm_s=1.0, tp=1)


def test_a_controller_that_dies_while_it_changes_the_plan_leaves_a_successor_that_finishes(world: OwnProcess) -> None:
    world.call(crash_controllers)


def crash_controllers() -> None:
    bench, numbers = BenchWorld.bench, random.Random(5)
    for number in range(_NUM_CRASHES):
        _, plan = plan_of(number, replan_options())
        version = bench.platform.call("apply_plan", plan, renumber=True).plan.version
        time.sleep(numbers.uniform(0, 3))
        (process,) = bench.processes("ControllerActor")
        process.kill()
        process.wait(10)
        asyncio.run(reached(version))
        status = bench.status()
        assert [group.name for group in status.groups] == [group.name for group in plan.groups], status
        running = {replica.replica_id for group in status.groups for replica in group.replicas}
        assert running == set(bench.replica_ids()), f"replicas of no group: {status}"


async def reached(version: int) -> None:
    """Also while the controller starts."""
    async with asyncio.timeout(120):
        while True:
            with contextlib.suppress(Exception):  # it is away: whatever Ray says of that
                await asyncio.to_thread(BenchWorld.bench.status)
                break
            await asyncio.sleep(0.2)
    await settled(BenchWorld.bench, version)


def test_a_base_without_replicas_comes_back_when_it_is_asked_for(world: OwnProcess) -> None:
    world.call(sleep_and_wake)


def sleep_and_wake() -> None:
    bench = BenchWorld.bench
    record = bench.platform.call("apply_plan", Plan(version=1, groups=()), renumber=True)
    asyncio.run(settled(bench, record.plan.version))
    assert bench.replica_ids() == ()
    answer = httpx.post(
        f"{bench.url}/v1/completions",
        headers={"authorization": f"Bearer {bench.key}"},
        json={"model": str(BASE), "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4
    assert len(bench.replica_ids()) == 1


def test_nodes_had_directories_of_their_own(world: OwnProcess) -> None:
    """Through all that came before: adapters were fetched to where replicas ran, traces lie at the controller's."""
    if not world.call(look_at_directories):
        pytest.skip("nodes with files of their own need mount namespaces, and these the rights of root")


def look_at_directories() -> bool:
    bench = BenchWorld.bench
    if not bench.cluster.own_files:
        return False
    head = {path.name for path in bench.data_of("head").iterdir()}
    assert {"control.db", "artifacts", "traces"} <= head, head
    for index in range(bench.setup.nodes):
        data = bench.data_of(node_name(index))
        assert {path.name for path in data.iterdir()} == {"cache"}
        assert any(path.suffix == ".safetensors" for path in data.rglob("*")), sorted(data.rglob("*"))
    # A dozen streams, undisturbed and disturbed, of each fault.
    num_rows = len(read_arrivals(str(bench.data_of("head") / "traces"), sort=True))
    assert num_rows >= 2 * 12, num_rows
    return True
