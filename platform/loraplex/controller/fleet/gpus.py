"""Counts free GPUs per node while a decision is made. Knows nothing of replicas. Pure: made anew for each decision."""

from collections.abc import Iterable, Sequence

from loraplex.core.fleet import NodeStatus
from loraplex.core.plan import Shape

_EPSILON = 1e-6
"""Shares of a GPU are binary fractions of nobody's choosing."""


class GpuLedger:
    """Of nodes that are up."""

    def __init__(self, nodes: Iterable[NodeStatus]) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._free = {name: float(node.num_gpus) for name, node in self._nodes.items()}

    def fitting(self, *, gpu: str, nodes: Sequence[str], shape: Shape, per_rank: float) -> tuple[str, ...] | None:
        """The node of each rank; None when there is no room. ``nodes`` empty: the fullest node that holds all ranks,
        or else whole nodes of one type, with whole stages on each. Changes nothing."""
        if per_rank <= 0:
            return tuple(nodes)
        if nodes:
            for name in set(nodes):
                if not self._holds(name, nodes.count(name) * per_rank):
                    return None
            return tuple(nodes)
        alike = [node for node in self._nodes.values() if not gpu or node.gpu == gpu]
        alone = [node.name for node in alike if self._holds(node.name, shape.num_ranks * per_rank)]
        if alone:
            return (min(alone, key=lambda name: (self._free[name], name)),) * shape.num_ranks
        return self._whole_nodes(alike, shape, per_rank)

    def take(self, nodes: Sequence[str], per_rank: float) -> None:
        """One rank on each of ``nodes``; nodes that are not up are ignored. May go below zero where more runs than the
        node has."""
        for name in nodes:
            if name in self._free:
                self._free[name] -= per_rank

    def give(self, nodes: Sequence[str], per_rank: float) -> None:
        self.take(nodes, -per_rank)

    def _holds(self, name: str, wanted: float) -> bool:
        return name in self._free and self._free[name] + _EPSILON >= wanted

    def _whole_nodes(self, alike: Sequence[NodeStatus], shape: Shape, per_rank: float) -> tuple[str, ...] | None:
        for gpu in dict.fromkeys(node.gpu for node in alike):
            names: list[str] = []
            for node in alike:
                ranks = int((node.num_gpus + _EPSILON) // per_rank)
                whole = node.gpu == gpu and self._free[node.name] + _EPSILON >= node.num_gpus
                if whole and ranks % shape.tp == 0 and 0 < ranks <= shape.num_ranks - len(names):
                    names += [node.name] * ranks
            if len(names) == shape.num_ranks:
                return tuple(names)
        return None
