"""Finds replicas among the actors of a Ray cluster, by their names, and puts what they answer into our errors.

A name tells all that a controller asks of a running replica, so that none has to be asked, which may be loading or on a
node that has just died. Blocking, but for ``answer``; called by the actuator.
"""

import asyncio
import contextlib
import time
from typing import Any, NamedTuple, Self
from urllib.parse import quote, unquote

import ray
from loraplex.core.errors import Unavailable
from loraplex.core.fleet import ReplicaTarget
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import Shape
from ray.exceptions import RayError, RayTaskError

from loraplex_deployments.control_client import NAMESPACE

_PREFIX = "loraplex-replica-"
_KILL_TIMEOUT_S = 5.0


class ReplicaName(NamedTuple):
    replica_id: ReplicaId
    group: str
    base_model_id: BaseModelId
    shape: Shape
    gpu: str

    @classmethod
    def of(cls, target: ReplicaTarget) -> Self:
        return cls(target.replica_id, target.group, target.base_model_id, target.shape, target.gpu)

    @classmethod
    def parse(cls, actor: str) -> Self | None:
        """None for the name of another actor."""
        if not actor.startswith(_PREFIX):
            return None
        replica_id, group, base, tp, pp, gpu = map(unquote, actor.removeprefix(_PREFIX).split("|"))
        shape = Shape(tp=int(tp), pp=int(pp))
        return cls(ReplicaId(replica_id), group, BaseModelId(base), shape, gpu)

    @property
    def actor(self) -> str:
        shape = self.shape
        parts = (self.replica_id, self.group, self.base_model_id, str(shape.tp), str(shape.pp), self.gpu)
        return _PREFIX + "|".join(quote(part, safe="") for part in parts)


def replica_names() -> tuple[ReplicaName, ...]:
    """Of those that live or are being created."""
    actors = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    return tuple(name for name in map(ReplicaName.parse, actors) if name is not None)


def handle_of(name: ReplicaName) -> Any | None:
    try:
        return ray.get_actor(name.actor, namespace=NAMESPACE)
    except ValueError:
        return None


def find_replica(replica_id: ReplicaId) -> tuple[ReplicaName, Any] | None:
    for name in replica_names():
        if name.replica_id == replica_id and (handle := handle_of(name)) is not None:
            return name, handle
    return None


def kill_replica(name: ReplicaName) -> None:
    """Returns when Ray has taken note, so that nobody finds it any more. Idempotent."""
    handle = handle_of(name)
    if handle is None:
        return
    with contextlib.suppress(RayError):
        ray.kill(handle)
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while handle_of(name) is not None and time.monotonic() < deadline_s:
        time.sleep(0.02)


async def answer(call: Any, *, timeout_s: float | None = None) -> Any:
    """The result of an actor's method. Unavailable with the reason when it raised, died, or was silent for so long."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except TimeoutError:
        raise Unavailable(f"the replica did not answer for {timeout_s:.0f} s") from None
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else None
        raise (cause if isinstance(cause, Unavailable) else Unavailable(reason_of(error))) from None


def reason_of(error: RayError) -> str:
    """One line."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[-1]
