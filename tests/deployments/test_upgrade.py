"""Controller, all replicas and all gateways are replaced one by one under open streams, and no stream notices."""

import asyncio
import itertools
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import msgspec
import psutil
import pytest
from loraplex.config.platform import PlatformConfig, parse_platform_config
from loraplex.core.errors import Conflict, Unavailable
from loraplex.core.plan import Plan
from loraplex.core.rollout import FleetStatus, PlanRecord, PlanState
from loraplex_deployments import upgrade
from loraplex_deployments.base_models import fleet_bases
from loraplex_deployments.bench_cluster import BenchCluster, ClusterSetup, PacedSetup
from loraplex_deployments.bench_streams import StreamWatch, WatchedStream, same_request
from loraplex_deployments.control_client import controller_handle
from loraplex_deployments.deploy import Deployed, Deployment
from loraplex_deployments.launch import RunningPlatform, stop_controller
from loraplex_deployments.ports import free_port
from loraplex_deployments.upgrade import check_fixed, hand_over, renew
from ray.exceptions import ActorDiedError

from tests.deployments.bench_world import BenchWorld, bench_world
from tests.deployments.deployed import Config, loraplex, one_line
from tests.deployments.joined_cluster import Cluster
from tests.deployments.own_process import OwnProcess

SETUP = ClusterSetup(nodes=1, gpus_per_node=3, replicas=2, gateways=2, adapters=2, paced=PacedSetup(factor=8.0))
_STREAMS = 6
_OUTPUT_TOKENS = 120
_TIMEOUT_S = 240.0
GOOD = "base_models: [{id: a, model: 'random:tiny-llama'}]\n"


@pytest.fixture
def world() -> Iterator[OwnProcess]:
    with bench_world(SETUP) as process:
        yield process
        process.call(stop_successor)


def stop_successor() -> None:
    """The platform that was started knows the first controller alone."""
    stop_controller(controller_handle())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_stream_breaks_while_everything_is_replaced(world: OwnProcess) -> None:
    world.call(upgraded_under_load, timeout_s=600)


def upgraded_under_load() -> None:
    bench = BenchWorld.bench
    old = bench.platform._config
    (base,) = old.base_models
    new = msgspec.structs.replace(
        old,
        base_models=(msgspec.structs.replace(base, engine=msgspec.structs.replace(base.engine, overdue_s=1.5)),),
        gateway=msgspec.structs.replace(old.gateway, max_choices=64),
    )
    replicas, processes = set(bench.replica_ids()), gateways(bench) | set(bench.processes("ControllerActor"))
    assert len(processes) == 1 + SETUP.gateways
    streams = asyncio.run(under_load(bench, old, new))
    assert [stream.error for stream in streams if stream.error] == []
    assert all(stream.done and len(stream.times_s) > 0 for stream in streams)
    assert len(streams) > _STREAMS
    assert not replicas & set(bench.replica_ids())
    assert len(bench.replica_ids()) == SETUP.replicas
    gone = psutil.wait_procs(processes, timeout=60)[0]
    assert set(gone) == processes
    assert len(gateways(bench)) == SETUP.gateways
    again = asyncio.run(repeated(bench, streams[:_STREAMS]))
    assert [stream.text for stream in again] == [stream.text for stream in streams[:_STREAMS]]


def gateways(bench: BenchCluster) -> set[psutil.Process]:
    return set(bench.processes("ServeReplica:loraplex:gateway"))


async def under_load(bench: BenchCluster, old: PlatformConfig, new: PlatformConfig) -> list[WatchedStream]:
    """All streams that were open at some time of the upgrade."""
    made = (
        WatchedStream(model=bench.models[number % len(bench.models)], prompt=[1, 2, 3 + number], seed=number)
        for number in itertools.count()
    )
    ended: list[WatchedStream] = []
    finished = asyncio.Event()

    async def keep_one_open() -> None:
        while not finished.is_set():
            watch = StreamWatch(bench.url, bench.key, output_tokens=_OUTPUT_TOKENS)
            watch.begin([next(made)])
            await watch.wait_end()
            ended.extend(watch.streams)
            await watch.close()

    keepers = [asyncio.create_task(keep_one_open()) for _ in range(_STREAMS)]
    await asyncio.sleep(1.0)
    try:
        await asyncio.to_thread(replaced, old, new)
    finally:
        finished.set()
        await asyncio.gather(*keepers)
    return sorted(ended, key=lambda stream: stream.seed)


def replaced(old: PlatformConfig, new: PlatformConfig) -> None:
    started_s = time.monotonic()

    def say(message: str) -> None:
        print(f"{time.monotonic() - started_s:6.1f} s  {message}", flush=True)

    platform: RunningPlatform = hand_over(old, new, say)
    assert platform.call("fleet_status").num_outdated == SETUP.replicas
    renew(platform, new, say, timeout_s=_TIMEOUT_S)
    say("upgraded")


async def repeated(bench: BenchCluster, streams: list[WatchedStream]) -> list[WatchedStream]:
    watch = StreamWatch(bench.url, bench.key, output_tokens=_OUTPUT_TOKENS)
    watch.begin([same_request(stream) for stream in streams])
    await watch.wait_end()
    await watch.close()
    return watch.streams


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_brings_another_config_to_what_is_deployed(cluster: Cluster, tmp_path: Path) -> None:
    config = Config(tmp_path, cluster)

    def upgraded() -> subprocess.CompletedProcess[str]:
        return loraplex("upgrade", "--config", config.write(), "--address", cluster.address)

    assert "nothing is deployed there" in one_line(upgraded(), 1)
    deployed = config.deploy()
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert config.complete().status_code == 200
    before = cluster.replica()

    listen = config.content["listen"]
    config.content["listen"] = {"http_port": free_port(), "grpc_port": free_port()}
    assert "listen.grpc_port, listen.http_port cannot change" in one_line(upgraded(), 1)
    config.content["listen"] = listen
    (base,) = config.content["base_models"]  # type: ignore[misc]
    base["tokenizer"] = str(tmp_path / "missing")
    assert "tokenizer" in one_line(upgraded(), 2)
    del base["tokenizer"]
    config.content["traces"] = {"url": "s3:///x"}  # seen when the new controller starts, so that the old one comes back
    assert "s3://BUCKET/PREFIX is meant" in one_line(upgraded(), 2)
    del config.content["traces"]
    assert cluster.replica() == before, "what is refused touches no replica"
    assert "deployed already" in config.deploy().stdout
    assert config.complete().status_code == 200

    base["engine"] = {"overdue_s": 1.5}
    config.content["tenants"] = [{"name": "acme"}, {"name": "globex"}]
    answer = upgraded()
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "the config differs in base_models, tenants" in answer.stdout
    assert cluster.replica() != before
    assert config.complete().status_code == 200
    again = config.deploy()
    assert "deployed already" in again.stdout, again.stdout + again.stderr


def test_the_record_names_the_old_config_again_whatever_ends_the_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = [parse_platform_config(GOOD + f"gateway: {{max_n: {n}}}\n", source="x") for n in (1, 2)]
    found = Deployment(
        deployed=Deployed(config=old, build="b", unix_s=0.0, began_serve=True),
        controller_answers=True,
        gateways_run=True,
        replica_failures={},
    )
    written: list[PlatformConfig] = []

    def died(*_args: object) -> RunningPlatform:
        raise ActorDiedError

    replaced = {
        "serve_environment": lambda config: nullcontext(),
        "joined": lambda address: nullcontext(),
        "check_on_head": lambda: None,
        "check_builds": lambda build: None,
        "find_deployment": lambda: found,
        "base_model_views": lambda config: None,
        "write_record": lambda config, *, began_serve: written.append(config),
        "hand_over": died,
    }
    for name, replacement in replaced.items():
        monkeypatch.setattr(upgrade, name, replacement)
    with pytest.raises(ActorDiedError):
        upgrade.upgrade(new, set_up=no_set_up, progress=print, given_up=lambda: False, timeout_s=1.0)
    assert written == [new, old]


def no_set_up(platform: RunningPlatform) -> None:
    raise AssertionError("there is no controller to set up")


class Standing(RunningPlatform):
    """Its counts stand still."""

    def __init__(self, num_outdated: int) -> None:
        self.num_outdated = num_outdated
        self.num_looks = 0

    def call(self, method: str, *args: object, **kwargs: object) -> FleetStatus:
        assert method == "fleet_status"
        self.num_looks += 1
        return FleetStatus(
            mode="off",
            active=PlanRecord(plan=Plan(version=0, groups=()), source="config", state=PlanState.SETTLED, created_s=0.0),
            settled=True,
            groups=(),
            problem="",
            num_outdated=self.num_outdated,
        )

    def replica_failures(self) -> dict[str, str]:
        return {}


def test_giving_up_is_heard_while_the_counts_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "_POLL_S", 0.0)
    platform, said = Standing(num_outdated=2), list[str]()
    config = parse_platform_config(GOOD, source="x")
    with pytest.raises(Unavailable, match="given up"):
        renew(platform, config, said.append, given_up=lambda: platform.num_looks >= 3, timeout_s=60.0)
    assert platform.num_looks == 3
    assert said == ["replicas of the old release: 2"]


def test_a_wait_of_no_time_looks_once() -> None:
    platform = Standing(num_outdated=2)
    with pytest.raises(Unavailable, match="2 replicas of the old release after 0 s"):
        renew(platform, parse_platform_config(GOOD, source="x"), print, timeout_s=0.0)
    assert platform.num_looks == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("listen: {http_port: 8080}\n", "listen.http_port"),
        ("data_dir: /elsewhere\n", "data_dir"),
        ("serve: {proxy: python}\n", "serve.proxy"),
        ("registry: {artifact_url: /elsewhere}\n", "registry.artifact_url"),
    ],
)
def test_what_cannot_change_is_named(change: str, key: str) -> None:
    old = parse_platform_config(GOOD, source="old")
    with pytest.raises(Conflict, match=rf"^{key} cannot change"):
        check_fixed(old, parse_platform_config(GOOD + change, source="new"))


def test_a_release_is_what_its_replicas_read() -> None:
    def release(text: str) -> str:
        return fleet_bases(parse_platform_config(text, source="x"))["a"].release  # type: ignore[index]

    first = release(GOOD)
    assert release(GOOD + "gateway: {max_choices: 7}\n") == first
    assert release(GOOD.replace("llama'", "llama', replicas: 3")) == first
    assert release(GOOD.replace("llama'", "llama', engine: {overdue_s: 1}")) != first
    assert release(GOOD + "replica: {keepalive_s: 3}\n") != first
    recorded = msgspec.json.encode(parse_platform_config(GOOD, source="x"))
    assert fleet_bases(msgspec.json.decode(recorded, type=PlatformConfig))["a"].release == first  # type: ignore[index]
    check_fixed(
        parse_platform_config(GOOD, source="x"), parse_platform_config(GOOD + "gateway: {max_n: 2}\n", source="x")
    )
