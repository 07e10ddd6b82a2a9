"""What a group can serve at most within the targets, from the cost model alone: where the search begins, and the bound.

A fluid view: prompts and tokens of the mean request of each base, batches as large as the TPOT target and the memory
for KV allow. Called by ``starts``, ``packing`` and ``bound``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from loraplex.core.errors import InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.cost.memory import PAGE_TOKENS, whole_adapter_bytes
from loraplex.cost.step_cost import StepComposition
from loraplex.planner.problem import Kind, Problem, arena_bytes
from loraplex.simulator.types import CostKey, ReplicaCost, Slo

_BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_CHUNK_TOKENS = 2048
_KV_SHARE = 0.8
"""Of the arena; the rest holds adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Of one base, over the whole trace."""

    requests_per_s: float
    shortest_prompt_tokens: float
    prompt_tokens: float
    """Mean, like the two below."""
    output_tokens: float
    adapter_bytes: float
    """0 for a base that is asked for without adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Of one base alone on a kind of group."""

    requests_per_s: float
    """0 when alone the mean request misses its targets, which others meet, or even the shortest one does."""
    request_s: float
    """Seconds of the whole group that the mean request takes in a full batch; infinite likewise."""
    batch: int


def demands(problem: Problem) -> dict[BaseModelId, Demand]:
    arrivals = problem.arrivals
    of_request = problem.base_of_requests()
    span_s = max(float(arrivals.arrival_s[-1] - arrivals.arrival_s[0]), 1e-9)
    found = {}
    for index, base in enumerate(problem.bases):
        chosen = of_request == index
        adapters = arrivals.adapter[chosen]
        cost = _any_cost(problem, base)
        sizes = [
            whole_adapter_bytes(cost.model, size.lora_rank, size.modules, itemsize=cost.itemsize)
            for size in problem.adapters
        ]
        used = np.array([*sizes, 0])[adapters] if len(adapters) else np.zeros(1)
        found[base] = Demand(
            requests_per_s=len(adapters) / span_s,
            shortest_prompt_tokens=float(arrivals.prompt_tokens[chosen].min()) if len(adapters) else 1.0,
            prompt_tokens=float(arrivals.prompt_tokens[chosen].mean()) if len(adapters) else 1.0,
            output_tokens=float(arrivals.output_tokens[chosen].mean()) if len(adapters) else 1.0,
            adapter_bytes=float(used.mean()),
        )
    return found


def capacities(
    problem: Problem, kinds: tuple[Kind, ...], demand: Mapping[BaseModelId, Demand]
) -> dict[tuple[Kind, BaseModelId], Capacity]:
    """InvalidInput naming a base whose targets no kind of group can meet, not even for its shortest request alone."""
    found: dict[BaseModelId, Iterator[Capacity]] = {}
    for base in problem.bases:
        own, of = [kind for kind in kinds if base in kind.bases], demand[base]
        for lone_tokens in (of.prompt_tokens, of.shortest_prompt_tokens):
            capacity = [_capacity(problem, kind, base, of, lone_tokens=lone_tokens) for kind in own]
            if any(one.requests_per_s > 0 for one in capacity):
                break
        else:
            slo = problem.slo_for(base)
            raise InvalidInput(
                f"no layout of base {base} meets ttft {slo.ttft_s:g} s and tpot {slo.tpot_s:g} s, not even for the "
                "shortest request alone",
                param="slo",
            )
        found[base] = iter(capacity)
    return {(kind, base): next(found[base]) for kind in kinds for base in kind.bases}


def meets_alone(cost: ReplicaCost, slo: Slo, prompt_tokens: float) -> bool:
    """Whether a request of so many prompt tokens on an idle replica meets both targets; adapters not counted."""
    prompt = StepComposition.of(
        prefill_rows=1.0,
        prefill_tokens=prompt_tokens,
        prefill_pairs=prompt_tokens * (prompt_tokens + 1) / 2,
        kv_tokens=prompt_tokens,
    )
    token = StepComposition.of(decode_rows=1.0, kv_tokens=prompt_tokens + 1)
    return bool(cost.step.latency_s(prompt)[0] <= slo.ttft_s and cost.step.latency_s(token)[0] <= slo.tpot_s)


def _capacity(problem: Problem, kind: Kind, base: BaseModelId, demand: Demand, *, lone_tokens: float) -> Capacity:
    """``lone_tokens``: of the prompt of a request that must meet its targets alone."""
    cost = problem.costs[CostKey(gpu=kind.gpu, base_model_id=base, shape=kind.shape)]
    slo = problem.slo_for(base)
    if not meets_alone(cost, slo, lone_tokens):
        return Capacity(requests_per_s=0.0, request_s=np.inf, batch=0)
    context = demand.prompt_tokens + demand.output_tokens / 2
    pages = _KV_SHARE * arena_bytes(problem, kind) / len(kind.bases) / cost.memory.page_bytes
    most = pages * PAGE_TOKENS / (demand.prompt_tokens + demand.output_tokens)
    rounds = _CHUNK_TOKENS / demand.prompt_tokens
    chunk = StepComposition.of(
        prefill_rows=rounds,
        prefill_tokens=_CHUNK_TOKENS,
        prefill_pairs=rounds * demand.prompt_tokens * (demand.prompt_tokens + 1) / 2,
        kv_tokens=_CHUNK_TOKENS,
        lora_tokens=_CHUNK_TOKENS if demand.adapter_bytes else 0.0,
    )
    prompt_s = float(cost.step.interval_s(chunk)[0]) / rounds
    best = Capacity(requests_per_s=0.0, request_s=np.inf, batch=0)
    for batch in _BATCHES:
        if batch > max(1.0, min(most, problem.engine.max_running)):
            break
        decode_s = _decode_s(cost, batch, context, demand, kind.shape.pp)
        request_s = prompt_s + demand.output_tokens * decode_s / batch
        # While prompts run the batch waits: its share of the time stretches every token.
        stretched_s = decode_s * request_s / max(request_s - prompt_s, 1e-12)
        if stretched_s <= slo.tpot_s and request_s < best.request_s:
            best = Capacity(requests_per_s=1 / request_s, request_s=request_s, batch=batch)
    if not best.batch:
        request_s = prompt_s + demand.output_tokens * _decode_s(cost, 1, context, demand, kind.shape.pp)
        return Capacity(requests_per_s=1 / request_s, request_s=request_s, batch=1)
    return best


def _decode_s(cost: ReplicaCost, batch: int, context: float, demand: Demand, stages: int) -> float:
    """Of a step in which every request of the batch gets one token."""
    parts = min(stages, batch)
    rows = batch / parts
    step = StepComposition.of(
        decode_rows=rows,
        kv_tokens=rows * context,
        num_adapters=rows if demand.adapter_bytes else 0.0,
        adapter_bytes=rows * demand.adapter_bytes,
        lora_tokens=rows if demand.adapter_bytes else 0.0,
    )
    return max(float(cost.step.latency_s(step)[0]), parts * float(cost.step.interval_s(step)[0]))


def _any_cost(problem: Problem, base: BaseModelId) -> ReplicaCost:
    for key, cost in problem.costs.items():
        if key.base_model_id == base:
            return cost
    raise InvalidInput(f"base {base}: no cost profile for it", param="base")
