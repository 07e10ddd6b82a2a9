"""Replicas of several ranks on Ray: they say what one rank says, and go on saying it when a rank dies or hangs.

The times are ``loraplex bench faults --no-paced --shape 2x1 --faults rank,rank-hangs`` and ``loraplex bench replan
--shapes 1x1,2x1,1x2``.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex_deployments.bench_cluster import BASE, SECOND_BASE, ClusterSetup, node_name
from loraplex_deployments.bench_faults import Fault, FaultOptions, FaultResult, measure_faults
from loraplex_deployments.bench_replan import ReplanBenchResult, ReplanOptions, measure_changes, settled
from loraplex_deployments.bench_streams import StreamWatch, WatchedStream
from loraplex_deployments.replica_handles import handle_of, replica_names

from tests.deployments.bench_world import BenchWorld, bench_world
from tests.deployments.own_process import OwnProcess

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SETUP = ClusterSetup(nodes=2, gpus_per_node=2, replicas=1, adapters=2, proxy="python", second_model="random:tiny-qwen2")
OUTPUT_TOKENS = 40


@pytest.fixture(scope="module")
def world() -> Iterator[OwnProcess]:
    with bench_world(SETUP) as process:
        yield process


@pytest.fixture(scope="module")
def texts_of_one_rank(world: OwnProcess) -> list[str]:
    return world.call(say)


def say(*bases: BaseModelId) -> list[str]:
    """Bases (the first one alone, if none is named) and adapters, drawn at random, all at once."""
    return asyncio.run(streamed([*map(str, bases or (BASE,)), *BenchWorld.bench.models]))


async def streamed(models: list[str]) -> list[str]:
    watch = StreamWatch(BenchWorld.bench.url, BenchWorld.bench.key, output_tokens=OUTPUT_TOKENS)
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
    take(*((shape, (BasePlacement(base_model_id=BASE),)) for shape in shapes))
    return ranks()


def take(*groups: tuple[Shape, tuple[BasePlacement, ...]]) -> None:
    planned = tuple(
        GroupPlan(name=f"group-{index}", shape=shape, bases=bases) for index, (shape, bases) in enumerate(groups)
    )
    record = BenchWorld.bench.platform.call("apply_plan", Plan(version=1, groups=planned), renumber=True)
    asyncio.run(settled(BenchWorld.bench, record.plan.version))


def take_both(shape: Shape) -> dict[BaseModelId, tuple[str, int]]:
    """Both bases on one group: the class of each one's executor, and the pages of its arena."""
    placed = (BasePlacement(base_model_id=BASE, arena_share=3.0), BasePlacement(base_model_id=SECOND_BASE))
    take((shape, placed))
    return {
        name.base_model_id: ray.get(handle_of(name).__ray_call__.remote(look))  # type: ignore[union-attr]
        for name in replica_names()
    }


def look(actor: Any) -> tuple[str, int]:
    """In the replica's process."""
    loop = actor._loop
    return type(loop._executor).__name__, loop.info.num_pages


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


BOTH = {BASE: ("TurnExecutor", 384), SECOND_BASE: ("TurnExecutor", 128)}


@pytest.fixture(scope="module")
def texts_of_bases_alone(world: OwnProcess) -> list[str]:
    world.call(take, *((Shape(), (BasePlacement(base_model_id=base),)) for base in (BASE, SECOND_BASE)))
    return world.call(say, BASE, SECOND_BASE)


def test_two_bases_of_a_group_say_what_each_says_alone(world: OwnProcess, texts_of_bases_alone: list[str]) -> None:
    assert world.call(take_both, Shape()) == BOTH
    assert world.call(say, BASE, SECOND_BASE) == texts_of_bases_alone


@pytest.mark.slow
def test_two_bases_of_two_shards_say_what_each_says_alone(world: OwnProcess, texts_of_bases_alone: list[str]) -> None:
    assert world.call(take_both, Shape(tp=2)) == BOTH
    assert len(world.call(ranks)) == 4
    assert world.call(say, BASE, SECOND_BASE) == texts_of_bases_alone


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
