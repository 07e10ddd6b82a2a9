"""Where groups lie on a Ray cluster: one placement group per group of a plan, with a bundle for each rank.

Translates between the fleet's words and Ray's. A node's name is its Ray node name (``ray start --node-name``, by
default its IP address). Its GPU type is what ``ray.gpu_types`` of the config says of its Ray accelerator type, which
Ray finds by itself and shows as the resource ``accelerator_type:H100``. Blocking; the actuator calls from threads.
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from loraplex.core.errors import InvalidInput, Unavailable
from loraplex.core.fleet import NodeStatus
from loraplex.core.plan import Shape
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

_PREFIX = "loraplex-group-"
_ACCELERATOR = "accelerator_type:"
_NODE_ID = "ray.io/node-id"
_TOUCH = 0.001
"""Of the resource that marks an accelerator type: a bundle that takes some of it lies on such a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResources:
    """What each rank of a group reserves."""

    num_cpus: float
    num_gpus: float


class Nodes:
    """The nodes that Ray takes for alive, as of its construction."""

    def __init__(self, gpu_types: Mapping[str, str]) -> None:
        """``gpu_types``: Ray's accelerator type -> ours."""
        self._accelerators = {ours: rays for rays, ours in gpu_types.items()}
        self._gpu_types = gpu_types
        self._alive: dict[str, dict[str, Any]] = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self._silent: frozenset[str] = frozenset()

    @property
    def node_ids(self) -> frozenset[str]:
        """Those of Ray, of all that it takes for alive."""
        return frozenset(self._alive)

    def leave_out(self, node_ids: Collection[str]) -> None:
        """These are dead, whatever Ray says."""
        self._silent = frozenset(node_ids)

    def daemon(self, node_id: str) -> str:
        """host:port of Ray's daemon there."""
        node = self._alive[node_id]
        return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"

    def status(self) -> tuple[NodeStatus, ...]:
        return tuple(
            NodeStatus(name=node["NodeName"], gpu=self._gpu(node), num_gpus=int(node["Resources"].get("GPU", 0)))
            for node_id, node in sorted(self._alive.items(), key=lambda item: str(item[1]["NodeName"]))
            if node_id not in self._silent
        )

    def name(self, node_id: str) -> str:
        """Its name; empty for one that is not alive."""
        return str(self._alive[node_id]["NodeName"]) if node_id in self._alive else ""

    def selector(self, name: str) -> dict[str, str]:
        """For a bundle that shall lie there. Unavailable when no such node is alive."""
        up = self._alive.keys() - self._silent
        found = [node_id for node_id in up if self._alive[node_id]["NodeName"] == name]
        if not found:
            raise Unavailable(f"node {name} is not up")
        return {_NODE_ID: found[0]}

    def accelerator(self, gpu: str) -> str:
        """Ray's resource that marks nodes with this GPU type of ours."""
        return _ACCELERATOR + self._accelerators.get(gpu, gpu)

    def _gpu(self, node: dict[str, Any]) -> str:
        for resource in node["Resources"]:
            if resource.startswith(_ACCELERATOR):
                found = resource.removeprefix(_ACCELERATOR)
                return self._gpu_types.get(found, found)
        return ""


def reserve(
    group: str, *, shape: Shape, resources: RankResources, gpu: str, nodes: Sequence[str], known: Nodes
) -> PlacementGroup:
    """The placement group of a group, which may have to wait for room; it is made unless it exists, in which case its
    bundles are those of the replica that came first.

    All ranks of one stage have to share a node: without named nodes a group of one stage is packed strictly, one of
    several as well as Ray can. InvalidInput when ``nodes`` says otherwise.
    """
    with contextlib.suppress(ValueError):
        return get_placement_group(_PREFIX + group)
    if nodes and len(nodes) != shape.num_ranks:
        raise InvalidInput(f"group {group}: {shape.num_ranks} ranks, but {len(nodes)} nodes are named", param="plan")
    for first in range(0, len(nodes), shape.tp):
        if len(set(nodes[first : first + shape.tp])) != 1:
            raise InvalidInput(f"group {group}: the ranks of a stage must share a node", param="plan")
    bundle = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
    if gpu and resources.num_gpus:
        bundle[known.accelerator(gpu)] = _TOUCH
    return placement_group(
        [{kind: amount for kind, amount in bundle.items() if amount}] * shape.num_ranks,
        strategy="STRICT_PACK" if len(set(nodes)) == 1 or (not nodes and shape.pp == 1) else "PACK",
        name=_PREFIX + group,
        lifetime="detached",
        bundle_label_selector=[known.selector(name) for name in nodes] or None,
    )


def is_reserved(group: PlacementGroup) -> bool:
    """False while it waits for room. Unavailable when it was removed."""
    state = placement_group_table(group).get("state", "REMOVED")
    if state == "REMOVED":
        raise Unavailable("the replica was stopped while it waited for room")
    return bool(state == "CREATED")


def release(group: str) -> None:
    """Idempotent."""
    with contextlib.suppress(ValueError):  # there is none
        remove_placement_group(get_placement_group(_PREFIX + group))


def reserved_groups() -> dict[str, tuple[str, ...]]:
    """Group -> Ray's id of the node of each rank, empty while it waits for room."""
    found = {}
    for entry in placement_group_table().values():
        if entry["name"].startswith(_PREFIX) and entry["state"] != "REMOVED":
            node_ids = [entry["bundles_to_node_id"][rank] for rank in sorted(entry["bundles_to_node_id"])]
            found[entry["name"].removeprefix(_PREFIX)] = tuple(node_ids) if all(node_ids) else ()
    return found
