"""What the nodes of a joined Ray cluster are and have: which is the head, which build of Loraplex each runs, whether
the replicas of a config find room. Called by ``deploy``."""

from dataclasses import dataclass
from typing import Any

import ray
from loraplex.config.platform import BaseModelConfig, PlatformConfig
from loraplex.core.errors import BadConfig, Conflict, Unavailable
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loraplex_deployments.build_id import build_id

HEAD = "node:__internal_head__"
"""Ray's resource that the head alone has."""
TOUCH = 0.001
"""Of ``HEAD``: whoever takes some of it runs there."""
_ACCELERATOR = "accelerator_type:"
_BUILD_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    node_id: str
    address: str
    is_head: bool
    num_cpus: float
    """Logical ones, in use or not; likewise GPUs."""
    num_gpus: float
    gpu_type: str | None
    """As Ray calls it."""


def cluster_nodes() -> tuple[ClusterNode, ...]:
    """Those that are alive, the head first."""
    nodes = [_node(entry) for entry in ray.nodes() if entry["Alive"]]
    return tuple(sorted(nodes, key=lambda node: (not node.is_head, node.address)))


def check_on_head() -> None:
    """Raises BadConfig on any other node: database, artifacts and keys lie in a directory of the head."""
    (head,) = [node for node in cluster_nodes() if node.is_head]
    if ray.get_runtime_context().get_node_id() != head.node_id:
        raise BadConfig(f"run this on the cluster's head node, {head.address} (`ray exec` does)", param="address")


def check_builds(expected: str) -> None:
    """Raises Conflict when a node has another Loraplex or none, Unavailable when one does not answer."""
    nodes = cluster_nodes()
    answers = [
        _build.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote()
        for node in nodes
    ]
    for node, answer in zip(nodes, answers, strict=True):
        try:
            build = ray.get(answer, timeout=_BUILD_TIMEOUT_S)
        except GetTimeoutError:
            raise Unavailable(f"node {node.address} does not run tasks") from None
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise Conflict(f"node {node.address} cannot run this loraplex: {reason}") from None
        if build != expected:
            raise Conflict(
                f"node {node.address} has loraplex {build}, this is {expected}: install the same on all nodes"
            )


def missing_room(config: PlatformConfig) -> str | None:
    """Why the nodes of now cannot hold the replicas that each base asks for, taken alone; None when they can."""
    nodes = cluster_nodes()
    for base in config.base_models:
        if sum(_num_ranks(base, node) for node in nodes) < base.replicas:
            have = ", ".join(f"{node.address} {node.num_cpus:g} and {node.num_gpus:g}" for node in nodes)
            return (
                f"base {base.id} asks for {base.replicas} x ({base.num_cpus:g} CPUs and {base.num_gpus:g} GPUs), and "
                f"the nodes have: {have}"
            )
    return None


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def _build() -> str:
    return build_id()


def _num_ranks(base: BaseModelConfig, node: ClusterNode) -> int:
    rooms = [(base.num_cpus, node.num_cpus), (base.num_gpus, node.num_gpus)]
    return int(min(has // needs for needs, has in rooms if needs > 0))


def _node(entry: dict[str, Any]) -> ClusterNode:
    resources = entry["Resources"]
    gpu_types = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    return ClusterNode(
        node_id=entry["NodeID"],
        address=entry["NodeManagerAddress"],
        is_head=HEAD in resources,
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        gpu_type=gpu_types[0] if gpu_types else None,
    )
