"""Replicas of several ranks on Ray: they say what one rank says, and go on saying it when a rank dies or hangs.

The times are ``loraplex bench faults --no-paced --shape 2x1 --faults rank,rank-hangs`` and ``loraplex bench replan
--shapes 1x1,2x1,1x2``.
"""

import asyncio
from collections.abc import Iterator

import pytest
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex_deployments.bench_cluster import BASE, ClusterSetup, node_name
from loraplex_deployments.bench_faults import Fault, FaultOptions, FaultResult, measure_faults
from loraplex_deployments.bench_replan import ReplanBenchResult, ReplanOptions, measure_changes, settled
from loraplex_deployments.bench_streams import StreamWatch, WatchedStream

from tests.deployments.bench_world import BenchWorld, bench_world
from tests.deployments.own_process import OwnProcess

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SETUP = ClusterSetup(nodes=2, gpus_per_node=2, replicas=1, adapters=2, proxy="python")
OUTPUT_TOKENS = 40


@pytest.fixture(scope="module")
def world() -> Iterator[OwnProcess]:
    with bench_world(SETUP) as process:
        yield process


@pytest.fixture(scope="module")
def texts_of_one_rank(world: OwnProcess) -> list[str]:
    return world.call(say)


def say() -> list[str]:
    """Base and adapters, drawn at random, all at once."""
    return asyncio.run(streamed())


async def streamed() -> list[str]:
    watch = StreamWatch(BenchWorld.bench.url, BenchWorld.bench.key, output_tokens=OUTPUT_TOKENS)
    models = [str(BASE), *BenchWorld.bench.models]
    try:
        watch.begin(
            [
                WatchedStream(model=models[index % len(models)], prompt=[5 + index, 7, 11 * index], seed=index)
                for index in range(6)
            ]
        )
        await watch.wait_end()
    finally:
        await watch.close()
    assert all(stream.done for stream in watch.streams), [stream.error for stream in watch.streams]
    return [stream.text for stream in watch.streams]


def take_shapes(*shapes: Shape) -> list[int]:
    """A replica of each; how many ranks there are on Ray's actors."""
    groups = tuple(
        GroupPlan(name=f"group-{index}", shape=shape, bases=(BasePlacement(base_model_id=BASE),))
        for index, shape in enumerate(shapes)
    )
    record = BenchWorld.bench.platform.call("apply_plan", Plan(version=1, groups=groups), renumber=True)
    asyncio.run(settled(BenchWorld.bench, record.plan.version))
    return ranks()


def take_two_nodes() -> list[int]:
    """How many ranks each has."""
    nodes = (node_name(0), node_name(1))
    group = GroupPlan(name="g", shape=Shape(pp=2), nodes=nodes, bases=(BasePlacement(base_model_id=BASE),))
    record = BenchWorld.bench.platform.call("apply_plan", Plan(version=1, groups=(group,)), renumber=True)
    asyncio.run(settled(BenchWorld.bench, record.plan.version))
    return [
        sum("RankActor" in " ".join(p.cmdline()) for p in BenchWorld.bench.cluster.processes(node)) for node in nodes
    ]


def ranks() -> list[int]:
    return [process.pid for process in BenchWorld.bench.ranks()]


def test_two_shards_say_what_one_rank_says(world: OwnProcess, texts_of_one_rank: list[str]) -> None:
    assert len(world.call(take_shapes, Shape(tp=2))) == 2
    assert world.call(say) == texts_of_one_rank


@pytest.mark.slow
def test_two_stages_on_two_nodes_say_what_one_rank_says(world: OwnProcess, texts_of_one_rank: list[str]) -> None:
    assert world.call(take_two_nodes) == [1, 1]
    assert world.call(say) == texts_of_one_rank


def test_a_rank_that_is_killed_costs_a_pause(world: OwnProcess) -> None:
    before = world.call(take_shapes, Shape(tp=2), Shape(pp=2))
    check(world.call(disturb, Fault.RANK))
    after = world.call(ranks)
    assert len(after) == len(before) == 4
    assert len(set(before) & set(after)) == 2, "the other group has nothing to do with it"


@pytest.mark.slow
def test_a_rank_that_hangs_costs_a_pause(world: OwnProcess) -> None:
    world.call(take_shapes, Shape(tp=2), Shape(pp=2))
    check(world.call(disturb, Fault.RANK_HANGS))


@pytest.mark.slow
def test_no_request_fails_and_no_answer_differs_while_groups_change_their_shape(world: OwnProcess) -> None:
    result = world.call(reshape)
    assert [change.shapes for change in result.changes] == [(Shape(tp=2),), (Shape(pp=2),), (Shape(),)]
    assert (result.failed, result.errors) == (0, {})
    assert result.compared > 10
    assert result.different == 0


def reshape() -> ReplanBenchResult:
    options = ReplanOptions(
        cluster=SETUP,
        changes=3,
        requests_per_s=1.5,
        output_tokens=16,
        calm_s=1.0,
        shapes=(Shape(), Shape(tp=2), Shape(pp=2)),
    )
    return asyncio.run(measure_changes(BenchWorld.bench, options))


def disturb(fault: Fault) -> FaultResult:
    options = FaultOptions(cluster=SETUP, streams=6, output_tokens=200, faults=(fault,))
    (result,) = asyncio.run(measure_faults(BenchWorld.bench, options)).results
    return result


def check(result: FaultResult) -> None:
    assert result.unfinished == result.streams, "stopped too late to tell anything"
    assert (result.broken, result.errors) == (0, ())
    assert result.identical == result.streams
    assert result.noticed_s is not None
    assert result.noticed_s < 10
    assert result.settled_s < 60
