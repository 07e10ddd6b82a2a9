"""The ranks of a replica as Ray actors, each in its bundle of the group's placement group.

Implements ``model_runner.ranks.launcher.RankLauncher`` for the replica actor, which creates and owns them: Ray ends
them with it, and a rank ends by itself when its connection to the replica breaks. Tensors, steps and tokens never pass
through Ray.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

import ray
from loraplex.config.platform import BaseModelConfig, PlatformConfig
from loraplex.core.adapter import AdapterManifest
from loraplex.model_runner.ranks.launcher import RankProcess, RankStart
from loraplex.registry.cache import NodeCache
from loraplex.telemetry.logs import configure_logging
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from loraplex_deployments.base_models import model_source
from loraplex_deployments.control_client import RayArtifactReader, controller_handle
from loraplex_deployments.replica_handles import reason_of


@ray.remote(max_restarts=0)
class RankActor:
    """One rank. Its process computes nothing else and ends with the rank."""

    def __init__(self, base: BaseModelConfig, config: PlatformConfig, engine_node: str) -> None:
        """``engine_node``: Ray's id of the node of the replica's engine."""
        configure_logging(config.telemetry.logs)
        self._elsewhere = ray.get_runtime_context().get_node_id() != engine_node
        if self._elsewhere:
            # Made on this node as well, at the path that the engine names.
            model_source(config, base)
            self._cache = node_cache(config)

    def run(self, start: RankStart) -> None:
        """Does not return: the process ends."""
        # torch takes seconds; whoever only launches ranks needs none of it.
        from loraplex.model_runner.ranks.worker import run_rank

        start = replace(start, device_index=_show_all_gpus())
        if self._elsewhere:
            run_rank(start, self._fetched)
        run_rank(start)

    @contextlib.contextmanager
    def _fetched(self, manifest: AdapterManifest, path: str) -> Iterator[str]:
        """The engine's ``path`` is one of another machine."""
        with self._cache.open(manifest.digest) as (_, own_path):
            yield own_path


def _show_all_gpus() -> int:
    """The index of this rank's GPU among those of its node. Ray shows an actor its own alone, but the ranks of a stage
    read each other's memory. Before CUDA starts in this process."""
    own = ray.get_gpu_ids()
    if len(own) != 1 or not str(own[0]).isdigit():  # a part of a GPU has a name
        return 0
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return int(own[0])


def node_cache(config: PlatformConfig) -> NodeCache:
    """Of the adapters' files on this node; what it lacks comes from the controller, or from where that says."""
    return NodeCache(config.registry, directory=config.root / "cache", reader=RayArtifactReader(controller_handle()))


class RayRankLauncher:
    """Each rank in the bundle of its number."""

    def __init__(
        self, group: PlacementGroup, base: BaseModelConfig, config: PlatformConfig, *, num_gpus: float
    ) -> None:
        """Called in the replica actor. ``num_gpus``: what each rank takes of its bundle's GPU, whose CPUs it shares."""
        self._group = group
        self._base = base
        self._config = config
        self._num_gpus = num_gpus

    @property
    def host(self) -> str:
        return str(ray.util.get_node_ip_address())

    def launch(self, start: RankStart) -> RankProcess:
        actor = RankActor.options(  # type: ignore[attr-defined]
            num_cpus=0,
            num_gpus=self._num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=start.rank
            ),
        ).remote(self._base, self._config, ray.get_runtime_context().get_node_id())
        return _RankActorProcess(actor, actor.run.remote(start))


class _RankActorProcess:
    def __init__(self, actor: ActorHandle, run: "ray.ObjectRef[None]") -> None:
        self._actor = actor
        self._run = run

    def ended(self) -> str | None:
        done, _ = ray.wait([self._run], timeout=0)
        if not done:
            return None
        try:
            ray.get(self._run)
        except RayError as error:
            # What follows are Ray's guesses at why.
            return reason_of(error).partition(". ")[0]
        raise AssertionError("a rank's process ends with the rank")

    def kill(self) -> None:
        """A process that does not hear is killed by its node's Ray, some seconds later."""
        ray.kill(self._actor)
