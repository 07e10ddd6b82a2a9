"""Carries out what the controller decides about replicas on Ray. Implements ``core.fleet.Actuator``.

A group of a plan is a placement group with a bundle per rank, a replica a named actor in it; both are detached and
found again by name, so that a restarted controller adopts what runs instead of starting it twice. Several bases of a
group share its bundles. Every command is refused when a later controller has been heard of, by the register of epochs
and by the replica itself. Called by the controller actor, and by the launcher when that could not clean up.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from loraplex.config.platform import BaseModelConfig, PlatformConfig
from loraplex.core.control import AdapterView, ReplicaRoute
from loraplex.core.errors import Unavailable
from loraplex.core.fleet import NodeStatus, ReplicaTarget, RunningReplica
from loraplex.core.ids import Digest, ReplicaId
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from loraplex_deployments.control_client import NAMESPACE
from loraplex_deployments.epoch_register import EpochRegister
from loraplex_deployments.placement import Nodes, RankResources, is_reserved, release, reserve, reserved_groups
from loraplex_deployments.replica_actor import ReplicaActor
from loraplex_deployments.replica_handles import (
    ReplicaName,
    answer,
    find_replica,
    kill_replica,
    reason_of,
    replica_names,
)

_MAX_BASES_PER_GROUP = 16
"""So many find room in a group: the engine of each, and each of its ranks, take half of this part of a bundle's GPU."""
_ANSWER_TIMEOUT_S = 5.0
"""For what a replica answers at once, also while it loads."""
_CONNECT_TIMEOUT_S = 0.5
_POLL_S = 0.1


def remove_all_replicas(cluster_secret: str | None = None) -> None:
    """Every replica and group of the platform; for when no controller is there to bring them back. With its secret the
    epochs are forgotten as well. Blocking."""
    for name in replica_names():
        kill_replica(name)
    for group in reserved_groups():
        release(group)
    if cluster_secret is not None:
        EpochRegister(cluster_secret).forget()


class RayActuator:
    def __init__(
        self,
        config: PlatformConfig,
        *,
        cluster_secret: str,
        adapters: Callable[[], Awaitable[tuple[AdapterView, ...]]],
    ) -> None:
        """``adapters``: all versions of all adapters, as of now."""
        self._config = config
        self._cluster_secret = cluster_secret
        self._adapters = adapters
        self._bases = {base.base_model_id: base for base in config.base_models}
        self._epochs = EpochRegister(cluster_secret)
        self._pending: set[ReplicaName] = set()
        """Replicas that wait for room."""
        self._silent: set[str] = set()
        """Ray's ids of nodes that do not answer. Ray itself takes many seconds to notice."""
        self._reserving = asyncio.Lock()
        """The bases of a group reserve it once, and not while it is released."""
        self._addresses: dict[ReplicaId, str] = {}

    async def nodes(self) -> tuple[NodeStatus, ...]:
        return (await self._nodes()).status()

    async def running(self) -> tuple[RunningReplica, ...]:
        """Besides: frees the GPUs of groups without a replica, which a controller leaves that dies between the two."""
        groups = await self._release_abandoned()
        names = await asyncio.to_thread(replica_names)
        known = await self._nodes()
        return tuple(
            RunningReplica(
                replica_id=name.replica_id,
                group=name.group,
                base_model_id=name.base_model_id,
                shape=name.shape,
                gpu=name.gpu,
                nodes=tuple(filter(None, map(known.name, groups.get(name.group, ())))),
            )
            for name in names
        )

    async def start(self, target: ReplicaTarget, *, epoch: int) -> ReplicaRoute:
        """As the protocol says. Unavailable also for a base that the config does not have, and for a shape that it
        cannot be cut into. What did not start is gone again."""
        base = self._bases.get(target.base_model_id)
        if base is None:
            raise Unavailable(f"the config has no base model {target.base_model_id}")
        await asyncio.to_thread(self._epochs.check, epoch)
        try:
            found = await asyncio.to_thread(find_replica, target.replica_id)
            handle = found[1] if found is not None else await self._create(target, base, epoch)
            address: str = await answer(handle.ready.remote(epoch))
            await answer(handle.assign.remote(await self._digests(target), epoch))
            # A later controller may have come meanwhile: it adopts what this one began.
            await asyncio.to_thread(self._epochs.check, epoch)
        except Unavailable as error:
            if error.code != "superseded":
                await asyncio.to_thread(kill_replica, ReplicaName.of(target))
                await self._release_abandoned()
            raise
        self._addresses[target.replica_id] = address
        return ReplicaRoute(
            replica_id=target.replica_id,
            base_model_id=target.base_model_id,
            address=address,
            group=target.group,
            shape=target.shape,
            gpu=target.gpu,
            adapters=target.adapters,
        )

    async def assign(self, target: ReplicaTarget, *, epoch: int) -> None:
        await asyncio.to_thread(self._epochs.check, epoch)
        found = await asyncio.to_thread(find_replica, target.replica_id)
        if found is None:
            raise Unavailable(f"replica {target.replica_id} does not run")
        await answer(found[1].assign.remote(await self._digests(target), epoch))

    async def wait_stopped(self, replica_id: ReplicaId) -> str:
        """Ray tells of a process within milliseconds, of a whole node in one second and a half."""
        found = await asyncio.to_thread(find_replica, replica_id)
        if found is None:
            return "it does not run"
        while True:
            try:
                await found[1].wait_stopped.remote()
                return "its engine has ended"
            except ActorUnavailableError:
                # It may be dead, which Ray takes many seconds to notice, or a broken connection that heals.
                if not await _listens(self._addresses.get(replica_id, "")):
                    groups = await asyncio.to_thread(reserved_groups)
                    self._silent.update(groups.get(found[0].group, ()))
                    return "its node does not answer"
            except RayError as error:
                return reason_of(error)

    async def num_unfinished(self, replica_id: ReplicaId) -> int:
        """Requests that run or wait there."""
        found = await asyncio.to_thread(find_replica, replica_id)
        if found is None:
            raise Unavailable(f"replica {replica_id} does not run")
        return int(await answer(found[1].num_unfinished.remote()))

    async def stop(self, replica_id: ReplicaId, *, epoch: int) -> None:
        await asyncio.to_thread(self._epochs.check, epoch)
        self._addresses.pop(replica_id, None)
        self._pending -= {name for name in self._pending if name.replica_id == replica_id}
        found = await asyncio.to_thread(find_replica, replica_id)
        if found is not None:
            name, handle = found
            try:
                await answer(handle.hear.remote(epoch), timeout_s=_ANSWER_TIMEOUT_S)
            except Unavailable as error:
                if error.code == "superseded":
                    raise
            await asyncio.to_thread(kill_replica, name)
        await self._release_abandoned()

    async def _nodes(self) -> Nodes:
        nodes = await asyncio.to_thread(Nodes, self._config.ray.gpu_types)
        self._silent &= nodes.node_ids
        for node_id in tuple(self._silent):
            if await _listens(nodes.daemon(node_id)):
                self._silent.discard(node_id)
        nodes.leave_out(self._silent)
        return nodes

    async def _create(self, target: ReplicaTarget, base: BaseModelConfig, epoch: int) -> Any:
        """Waits for room. Unavailable when it is stopped meanwhile."""
        name = ReplicaName.of(target)
        self._pending.add(name)
        try:
            known = await self._nodes()
            async with self._reserving:
                group = await asyncio.to_thread(self._reserve, target, base, known)
            while not await asyncio.to_thread(is_reserved, group):
                await asyncio.sleep(_POLL_S)
                if name not in self._pending:
                    raise Unavailable("the replica was stopped while it waited for room")
                for node in target.nodes:
                    # A node that dies, and may come back as another one, has no room for ever.
                    if (await self._nodes()).selector(node) != known.selector(node):
                        raise Unavailable(f"node {node} was lost before it had room")
            return await asyncio.to_thread(self._create_actor, name, group, target, base, epoch)
        finally:
            self._pending.discard(name)

    @staticmethod
    def _reserve(target: ReplicaTarget, base: BaseModelConfig, known: Nodes) -> PlacementGroup:
        return reserve(
            target.group,
            shape=target.shape,
            resources=RankResources(num_cpus=base.num_cpus, num_gpus=base.num_gpus),
            gpu=target.gpu,
            nodes=target.nodes,
            known=known,
        )

    def _create_actor(
        self, name: ReplicaName, group: PlacementGroup, target: ReplicaTarget, base: BaseModelConfig, epoch: int
    ) -> Any:
        num_gpus = base.num_gpus / _MAX_BASES_PER_GROUP / 2
        return ReplicaActor.options(  # type: ignore[attr-defined]
            name=name.actor,
            namespace=NAMESPACE,
            lifetime="detached",
            # The bundle holds the CPUs for all replicas in it.
            num_cpus=0,
            num_gpus=num_gpus,
            max_concurrency=1000,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=0),
        ).remote(target, base, self._config, self._cluster_secret, epoch, num_gpus)

    async def _release_abandoned(self) -> dict[str, tuple[str, ...]]:
        """Frees the GPUs of groups that no replica has or waits for; Ray's id of each rank's node of the others."""
        groups = await asyncio.to_thread(reserved_groups)
        # A replica waits before its group is reserved and until it has its actor's name: read after the groups, first
        # who waits and then the names, no group is missed that either had.
        waited = tuple(self._pending)
        named = await asyncio.to_thread(replica_names)
        async with self._reserving:  # nobody takes a group for a new replica while it is freed
            used = {name.group for name in (*waited, *named, *self._pending)}
            for group in groups.keys() - used:
                await asyncio.to_thread(release, group)
                del groups[group]
        return groups

    async def _digests(self, target: ReplicaTarget) -> tuple[Digest, ...]:
        """Current versions of the target's adapters that exist, most used first."""
        views = [view for view in await self._adapters() if view.base_model_id == target.base_model_id and view.current]
        found: dict[tuple[str | None, str], list[Digest]] = {}
        for view in views:
            for tenant in (view.ref.tenant, None):
                found.setdefault((tenant, view.ref.name), []).append(view.ref.digest)
        shares = sorted(target.adapters, key=lambda share: -share.weight)
        return tuple(digest for share in shares for digest in found.get((share.tenant, share.name), ()))


async def _listens(address: str) -> bool:
    """``address``: host:port; empty: nobody."""
    host, _, port = address.rpartition(":")
    if not host:
        return False
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True
