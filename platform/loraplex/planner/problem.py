"""What is planned for: nodes, costs, traffic, targets. And what a group may be: GPU type, shape, bases, if they fit.

Values only; made by the command ``plan`` and by tests, read by all of the planner.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np

from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan, Shape
from loraplex.cost.loads import Tier
from loraplex.cost.memory import PAGE_TOKENS, shared_arena_bytes
from loraplex.engine import EngineConfig
from loraplex.router.config import RouterConfig
from loraplex.simulator.types import AdapterSize, CostKey, IntArray, ReplicaCost, SimulationInput, Slo
from loraplex.traces.arrivals import Arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Of one type of GPU."""

    name: str
    gpu: str
    num_gpus: int


class Kind(NamedTuple):
    """What a group may be; several groups are alike if these are."""

    gpu: str
    shape: Shape
    bases: tuple[BaseModelId, ...]

    def __str__(self) -> str:
        return f"{'+'.join(self.bases)} tp{self.shape.tp} pp{self.shape.pp} on {self.gpu}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    nodes: tuple[Node, ...]
    arrivals: Arrivals
    """Every adapter and every request without one names its base."""
    adapters: tuple[AdapterSize, ...]
    """Of ``arrivals.adapters``, in their order."""
    costs: Mapping[CostKey, ReplicaCost]
    """Which shapes a base may take on a GPU type is which are here."""
    slo: Slo
    slo_of_base: Mapping[BaseModelId, Slo] = field(default_factory=dict)
    engine: EngineConfig = field(default_factory=EngineConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    adapter_tier: Tier = Tier.HOST
    max_bases_per_group: int = 2
    tenant_floor: float = 0.0
    """Attainment below which a tenant counts against a plan, however well the others fare."""
    turn_s: float = 0.0
    """``SimulationInput.turn_s``: what bases that share a group lose whenever another one's turn begins."""
    _sizes: dict[tuple[str | None, str | None, str], AdapterSize] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """InvalidInput for a trace without requests, or nodes without GPUs."""
        if not len(self.arrivals):
            raise InvalidInput("the trace has no requests", param="trace")
        if self.num_gpus < 1:
            raise InvalidInput("the fleet has no GPUs", param="fleet")
        names = ((a.base_model, a.tenant, a.name) for a in self.arrivals.adapters)
        object.__setattr__(self, "_sizes", dict(zip(names, self.adapters, strict=True)))

    def changed(
        self,
        *,
        nodes: tuple[Node, ...] | None = None,
        arrivals: Arrivals | None = None,
        slo: Slo | None = None,
        slo_of_base: Mapping[BaseModelId, Slo] | None = None,
    ) -> "Problem":
        """The same but for what is given."""
        return Problem(
            nodes=self.nodes if nodes is None else nodes,
            arrivals=self.arrivals if arrivals is None else arrivals,
            adapters=self.adapters,
            costs=self.costs,
            slo=self.slo if slo is None else slo,
            slo_of_base=self.slo_of_base if slo_of_base is None else slo_of_base,
            engine=self.engine,
            router=self.router,
            adapter_tier=self.adapter_tier,
            max_bases_per_group=self.max_bases_per_group,
            tenant_floor=self.tenant_floor,
            turn_s=self.turn_s,
        )

    def slo_for(self, base: BaseModelId) -> Slo:
        return self.slo_of_base.get(base, self.slo)

    @property
    def bases(self) -> tuple[BaseModelId, ...]:
        """That the trace asks for, in its order."""
        named = dict.fromkeys((*self.arrivals.base_models, *(a.base_model for a in self.arrivals.adapters)))
        return tuple(BaseModelId(base) for base in named if base is not None)

    def size_of(self, base: BaseModelId, tenant: str | None, name: str) -> AdapterSize | None:
        """None for an adapter that the trace does not have."""
        return self._sizes.get((base, tenant, name))

    @property
    def num_gpus(self) -> int:
        return sum(node.num_gpus for node in self.nodes)

    def simulation(self, plan: Plan, arrivals: Arrivals | None = None) -> SimulationInput:
        return SimulationInput(
            plan=plan,
            arrivals=self.arrivals if arrivals is None else arrivals,
            adapters=self.adapters,
            costs=self.costs,
            slo=self.slo,
            slo_of_base=self.slo_of_base,
            engine=self.engine,
            router=self.router,
            adapter_tier=self.adapter_tier,
            turn_s=self.turn_s,
        )

    def base_of_requests(self) -> IntArray:
        """[R] index into ``bases``; InvalidInput naming the row that says none."""
        index: dict[str | None, int] = {base: position for position, base in enumerate(self.bases)}
        of_adapter = np.array([index.get(a.base_model, -1) for a in self.arrivals.adapters] + [-1], dtype=np.int32)
        of_base = np.array([index[base] for base in self.arrivals.base_models] + [-1], dtype=np.int32)
        found = np.where(
            self.arrivals.base_model >= 0, of_base[self.arrivals.base_model], of_adapter[self.arrivals.adapter]
        )
        if (found < 0).any():
            raise InvalidInput(f"trace row {int(np.argmax(found < 0))}: no base is given", param="trace")
        return found


def kinds(problem: Problem) -> tuple[Kind, ...]:
    """All groups that the nodes and their memory allow, of one base and of several together.

    A group lies on one node, or on whole nodes of one type. Memory holds the weights and, beside them, for each base
    the KV of its longest request and its largest adapter. InvalidInput naming a base that fits nowhere.
    """
    longest = _longest_pages(problem)
    found = [
        kind
        for gpu in dict.fromkeys(node.gpu for node in problem.nodes)
        for size in range(1, problem.max_bases_per_group + 1)
        for bases in combinations(problem.bases, size)
        for shape in _shapes(problem, gpu, bases)
        if _fits(problem, kind := Kind(gpu, shape, bases), longest)
    ]
    for base in problem.bases:
        if not any(base in kind.bases for kind in found):
            raise InvalidInput(_why_nowhere(problem, base), param="fleet")
    return tuple(found)


def place(problem_nodes: Sequence[Node], wanted: Sequence[Kind]) -> list[tuple[str, ...]] | None:
    """The nodes of each group's ranks, the largest groups first; None when they do not fit."""
    free = {node.name: node.num_gpus for node in problem_nodes}
    placed: list[tuple[str, ...]] = [()] * len(wanted)
    for index in sorted(range(len(wanted)), key=lambda i: -wanted[i].shape.num_ranks):
        kind, ranks = wanted[index], wanted[index].shape.num_ranks
        nodes = [node for node in problem_nodes if node.gpu == kind.gpu]
        # The fullest node that still has room: large holes are kept for large groups.
        fitting = [node for node in nodes if free[node.name] >= ranks]
        if fitting:
            chosen = min(fitting, key=lambda node: free[node.name])
            free[chosen.name] -= ranks
            placed[index] = (chosen.name,) * ranks
            continue
        names: list[str] = []
        for node in nodes:
            if free[node.name] == node.num_gpus and len(names) < ranks:
                names += [node.name] * node.num_gpus
        if len(names) != ranks or any(node.num_gpus % kind.shape.tp for node in nodes if node.name in names):
            return None
        for name in set(names):
            free[name] = 0
        placed[index] = tuple(names)
    return placed


def arena_bytes(problem: Problem, kind: Kind) -> int:
    """What the bases leave of a GPU."""
    return shared_arena_bytes(
        [problem.costs[CostKey(gpu=kind.gpu, base_model_id=base, shape=kind.shape)].memory for base in kind.bases]
    )


def _shapes(problem: Problem, gpu: str, bases: tuple[BaseModelId, ...]) -> Iterator[Shape]:
    nodes = [node for node in problem.nodes if node.gpu == gpu]
    for key in problem.costs:
        if key.gpu == gpu and key.base_model_id == bases[0]:
            known = all(CostKey(gpu=gpu, base_model_id=base, shape=key.shape) in problem.costs for base in bases)
            if known and place(nodes, [Kind(gpu, key.shape, bases)]) is not None:
                yield key.shape


def _longest_pages(problem: Problem) -> dict[BaseModelId, tuple[int, list[AdapterSize]]]:
    """Tokens of the longest request and the adapters of each base."""
    of_request = problem.base_of_requests()
    tokens = problem.arrivals.prompt_tokens.astype(np.int64) + problem.arrivals.output_tokens
    found: dict[BaseModelId, tuple[int, list[AdapterSize]]] = {}
    for index, base in enumerate(problem.bases):
        sizes = {
            size
            for adapter, size in zip(problem.arrivals.adapters, problem.adapters, strict=True)
            if adapter.base_model == base
        }
        found[base] = int(np.max(tokens[of_request == index], initial=1)), list(sizes)
    return found


def _fits(problem: Problem, kind: Kind, longest: Mapping[BaseModelId, tuple[int, list[AdapterSize]]]) -> bool:
    arena = arena_bytes(problem, kind) // len(kind.bases)
    for base in kind.bases:
        memory = problem.costs[CostKey(gpu=kind.gpu, base_model_id=base, shape=kind.shape)].memory
        tokens, sizes = longest[base]
        adapter = max((memory.adapter_pages(size.lora_rank, size.modules) for size in sizes), default=0)
        if arena // memory.page_bytes < -(-tokens // PAGE_TOKENS) + adapter:
            return False
    return True


def _why_nowhere(problem: Problem, base: BaseModelId) -> str:
    types = ", ".join(dict.fromkeys(f"{node.gpu}" for node in problem.nodes))
    keys = [key for key in problem.costs if key.base_model_id == base]
    if not keys:
        return f"base {base}: no cost profile for it on {types}"
    most = max(problem.costs[key].memory.arena_bytes for key in keys)
    return (
        f"base {base} fits nowhere: no shape on {problem.num_gpus} GPUs ({types}) leaves room for its longest request "
        + (f"(at best {most} bytes are left per GPU)")
    )
