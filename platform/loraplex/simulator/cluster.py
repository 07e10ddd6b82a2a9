"""A plan as replicas with numbers: pages, adapter sizes, who may serve whom. The same for both simulators.

Owns the arithmetic of memory and the rule of adapter sets. Pure; called by ``exact`` and ``fast``.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import GroupPlan, Shape
from loraplex.cost.memory import PAGE_TOKENS, shared_arena_bytes, shared_pages, whole_adapter_bytes
from loraplex.router.prediction import Rates
from loraplex.simulator.types import CostKey, FloatArray, IntArray, ReplicaCost, SimulationInput, Slo
from loraplex.simulator.workload import Workload

PAGE_SIZE = PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One base on one group."""

    replica_id: ReplicaId
    group: int
    base: int
    """Index into ``Cluster.bases``."""
    shape: Shape
    cost: ReplicaCost
    num_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTable:
    """The distinct adapter sizes on one cost. Arrays of shape (sizes,)."""

    pages: IntArray
    """Of the arena."""
    whole_bytes: FloatArray
    """Over all GPUs: what a step's time counts."""
    load_s: FloatArray
    """From host memory into the arena."""
    fetch_s: FloatArray
    """Into host memory, from the tier where it lies at first; 0 when that is host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """P replicas. Route keys are adapters (A of them), then bases: K in all."""

    bases: tuple[BaseModelId, ...]
    replicas: tuple[Replica, ...]
    tables: tuple[AdapterTable, ...]
    """Of each replica; equal costs share one."""
    request_base: IntArray
    """[R] index into ``bases``."""
    request_key: IntArray
    """[R]"""
    first_candidate: IntArray
    """[K + 1] into ``candidates``."""
    candidates: IntArray
    """Replica indices, those of one key together, ascending."""
    weights: FloatArray
    """Of the candidates."""
    is_listed: npt.NDArray[np.bool_]
    """[K] an adapter that the plan puts somewhere."""
    slo_ttft_s: FloatArray
    """[R]"""
    slo_tpot_s: FloatArray
    """[R]"""

    @classmethod
    def of(cls, given: SimulationInput, workload: Workload) -> "Cluster":
        """InvalidInput naming the group and base that has no cost or no room, or the request whose base is not said
        while the plan has several."""
        planned = tuple(dict.fromkeys(base.base_model_id for group in given.plan.groups for base in group.bases))
        bases = tuple(dict.fromkeys((*(BaseModelId(base) for base in workload.bases), *planned)))
        replicas = tuple(
            replica
            for index, group in enumerate(given.plan.groups)
            for replica in _replicas(given, group, index, {base: i for i, base in enumerate(bases)})
        )
        if not replicas:
            raise InvalidInput("the plan has no group with a base", param="plan")
        only = bases.index(planned[0]) if len(planned) == 1 else -1
        request_base = _resolved(workload.request_base, only)
        if (request_base < 0).any():
            row = int(np.argmax(request_base < 0))
            raise InvalidInput(f"trace row {row}: no base is given, and the plan has {len(planned)}", param="trace")
        adapter_base = _resolved(workload.adapter_base, only)
        arrivals = workload.arrivals
        first, candidates, weights, is_listed = _candidates(given, workload, bases, replicas, adapter_base)
        slos = [given.slo_of_base.get(base, given.slo) for base in bases]
        by_cost: dict[int, AdapterTable] = {}
        for replica in replicas:
            if id(replica.cost) not in by_cost:
                by_cost[id(replica.cost)] = _adapter_table(given, workload, replica)
        return cls(
            bases=bases,
            replicas=replicas,
            tables=tuple(by_cost[id(replica.cost)] for replica in replicas),
            request_base=request_base,
            request_key=np.where(arrivals.adapter >= 0, arrivals.adapter, len(arrivals.adapters) + request_base).astype(
                np.int32
            ),
            first_candidate=first,
            candidates=candidates,
            weights=weights,
            is_listed=is_listed,
            slo_ttft_s=_of_base(slos, "ttft_s")[request_base],
            slo_tpot_s=_of_base(slos, "tpot_s")[request_base],
        )


def rates_of(given: SimulationInput, replica: Replica) -> Rates:
    """As the router has them of a replica whose cost profile it knows."""
    engine = given.engine
    return Rates.of(
        replica.cost.step, replica.shape, max_step_tokens=engine.max_step_tokens, max_running=engine.max_running
    )


def _resolved(base: IntArray, only: int) -> IntArray:
    return np.where(base < 0, only, base).astype(np.int32)


def _of_base(slos: list[Slo], name: str) -> FloatArray:
    return np.array([getattr(slo, name) for slo in slos], dtype=np.float64)


def _replicas(
    given: SimulationInput, group: GroupPlan, index: int, base_index: dict[BaseModelId, int]
) -> list[Replica]:
    costs: list[ReplicaCost] = []
    for placed in group.bases:
        cost = given.costs.get(CostKey(gpu=group.gpu, base_model_id=placed.base_model_id, shape=group.shape))
        if cost is None:
            raise InvalidInput(
                f"group {group.name}: no cost of {placed.base_model_id} on {group.gpu or 'its GPUs'} "
                f"with tp {group.shape.tp}, pp {group.shape.pp}",
                param="plan",
            )
        costs.append(cost)
    memories = [cost.memory for cost in costs]
    pages = shared_pages(memories, [placed.arena_share for placed in group.bases]) if memories else ()
    replicas = []
    for placed, cost, num_pages in zip(group.bases, costs, pages, strict=True):
        if num_pages < 1:
            arena_bytes = shared_arena_bytes(memories)
            together = " together with the group's other bases" if len(costs) > 1 else ""
            raise InvalidInput(
                f"group {group.name}: {placed.base_model_id} does not fit{together} "
                f"({-arena_bytes} bytes per GPU are missing)"
                if arena_bytes < 0
                else f"group {group.name}: {placed.base_model_id} leaves no page of memory{together}",
                param="plan",
            )
        replicas.append(
            Replica(
                replica_id=ReplicaId(f"{group.name}/{placed.base_model_id}"),
                group=index,
                base=base_index[placed.base_model_id],
                shape=group.shape,
                cost=cost,
                num_pages=num_pages,
            )
        )
    return replicas


def _candidates(
    given: SimulationInput,
    workload: Workload,
    bases: tuple[BaseModelId, ...],
    replicas: tuple[Replica, ...],
    adapter_base: IntArray,
) -> tuple[IntArray, IntArray, FloatArray, npt.NDArray[np.bool_]]:
    """(first [K + 1], replicas, weights, listed [K]): for each adapter and then each base."""
    position = {
        (bases[adapter_base[index]], adapter.tenant, adapter.name): index
        for index, adapter in enumerate(workload.arrivals.adapters)
        if adapter_base[index] >= 0
    }
    listed: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
    placements = [placed for group in given.plan.groups for placed in group.bases]
    for replica, placed in enumerate(placements):
        for share in placed.adapters:
            adapter = position.get((placed.base_model_id, share.tenant, share.name))
            if adapter is not None:
                if not share.weight > 0:
                    name = f"{share.tenant or ''}/{share.name}"
                    raise InvalidInput(f"adapter {name}: its weight {share.weight} is not above 0", param="plan")
                listed[adapter].append((replica, share.weight))
    of_base = [np.array([i for i, r in enumerate(replicas) if r.base == b], dtype=np.int32) for b in range(len(bases))]
    ones = [np.ones(len(found)) for found in of_base]
    none, no_weight = np.zeros(0, dtype=np.int32), np.zeros(0)
    parts: list[IntArray] = []
    weights: list[FloatArray] = []
    for adapter, base in enumerate(adapter_base.tolist()):
        if adapter in listed:
            parts.append(np.array([replica for replica, _ in listed[adapter]], dtype=np.int32))
            weights.append(np.array([weight for _, weight in listed[adapter]], dtype=np.float64))
        else:
            parts.append(of_base[base] if base >= 0 else none)
            weights.append(ones[base] if base >= 0 else no_weight)
    parts += of_base
    weights += ones
    first = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    is_listed = np.array([adapter in listed for adapter in range(len(adapter_base))] + [False] * len(bases))
    return first, np.concatenate(parts).astype(np.int32), np.concatenate(weights), is_listed


def _adapter_table(given: SimulationInput, workload: Workload, replica: Replica) -> AdapterTable:
    cost, num_gpus = replica.cost, replica.shape.num_ranks
    memory, loads = cost.memory, cost.loads
    whole = [
        whole_adapter_bytes(cost.model, size.lora_rank, size.modules, itemsize=cost.itemsize) for size in workload.sizes
    ]
    on_gpu = [memory.adapter_bytes(size.lora_rank, size.modules) for size in workload.sizes]
    host_s = [loads.host.seconds(num_bytes) for num_bytes in on_gpu]
    fetch_s = [
        loads.seconds(num_bytes, given.adapter_tier, num_gpus=num_gpus) - loads.seconds(num_bytes, num_gpus=num_gpus)
        for num_bytes in whole
    ]
    return AdapterTable(
        pages=np.array([memory.adapter_pages(size.lora_rank, size.modules) for size in workload.sizes], dtype=np.int32),
        whole_bytes=np.array(whole, dtype=np.float64),
        load_s=np.array(host_s, dtype=np.float64),
        fetch_s=np.array(fetch_s, dtype=np.float64),
    )
