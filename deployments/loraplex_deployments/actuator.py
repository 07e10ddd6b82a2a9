"""Starts and stops replicas on Ray: for each a placement group that pins its CPUs and GPUs, and one named actor in it.

Called by the controller actor, and by the launcher when that could not clean up. Replicas are detached and found again
by name, so that a restarted controller adopts what runs instead of starting it twice.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from loraplex.config.platform import BaseModelConfig, PlatformConfig
from loraplex.core.control import ReplicaRoute
from loraplex.core.ids import ReplicaId
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from loraplex_deployments.control_client import NAMESPACE
from loraplex_deployments.replica_actor import ReplicaActor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One replica that should run."""

    replica_id: ReplicaId
    base: BaseModelConfig


def replica_specs(config: PlatformConfig) -> tuple[ReplicaSpec, ...]:
    """All that ``config`` wants."""
    return tuple(
        ReplicaSpec(replica_id=ReplicaId(f"{base.id}-{index}"), base=base)
        for base in config.base_models
        for index in range(base.replicas)
    )


def remove_replica(replica_id: ReplicaId) -> None:
    """Ends the actor, if it still runs, and frees its placement group."""
    handle = _find(replica_id)
    if handle is not None:
        ray.kill(handle)
    _remove_group(replica_id)


def remove_replicas(config: PlatformConfig) -> None:
    """All of ``config``; for when no supervisor starts them again."""
    for spec in replica_specs(config):
        remove_replica(spec.replica_id)


class RayActuator:
    def __init__(self, config: PlatformConfig, cluster_secret: str) -> None:
        self._config = config
        self._cluster_secret = cluster_secret

    async def ensure(self, spec: ReplicaSpec) -> tuple[Any, ReplicaRoute]:
        """The running actor of ``spec``, adopted or started, once its engine is ready.

        Raises RayActorError or RayTaskError when it dies or cannot load while starting.
        """
        handle = _find(spec.replica_id) or await self._start(spec)
        address: str = await handle.ready.remote()
        route = ReplicaRoute(replica_id=spec.replica_id, base_model_id=spec.base.base_model_id, address=address)
        return handle, route

    async def _start(self, spec: ReplicaSpec) -> Any:
        # A group without its actor is what a controller left that died between the two.
        _remove_group(spec.replica_id)
        base = spec.base
        bundle = {"CPU": base.num_cpus, "GPU": base.num_gpus}
        group = placement_group(
            [{kind: amount for kind, amount in bundle.items() if amount}],
            strategy="STRICT_PACK",
            name=_group_name(spec.replica_id),
            lifetime="detached",
        )
        await group.ready()
        return ReplicaActor.options(  # type: ignore[attr-defined]
            name=_actor_name(spec.replica_id),
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=base.num_cpus,
            num_gpus=base.num_gpus,
            max_concurrency=1000,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
        ).remote(spec.replica_id, base, self._config, self._cluster_secret)


def _find(replica_id: ReplicaId) -> Any | None:
    try:
        return ray.get_actor(_actor_name(replica_id), namespace=NAMESPACE)
    except ValueError:
        return None


def _remove_group(replica_id: ReplicaId) -> None:
    with contextlib.suppress(ValueError):  # there is none
        remove_placement_group(get_placement_group(_group_name(replica_id)))


def _actor_name(replica_id: ReplicaId) -> str:
    return f"loraplex-replica-{replica_id}"


def _group_name(replica_id: ReplicaId) -> str:
    return f"loraplex-group-{replica_id}"
