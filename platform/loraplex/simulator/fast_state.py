"""What the fast simulator keeps of replicas, requests and adapters: arrays of ``fast_records``.

Owns their beginning; ``fast_memory``, ``fast_scheduler`` and ``fast_router`` change it. Steps of a replica
are numbered from 1; all its decoding requests advance in each, so one that starts to decode after step s with c tokens
has c + n - s tokens of context in step n.
"""

from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loraplex.cost.step_cost import StepCoefficients, StepCost
from loraplex.router.policy import hash64
from loraplex.router.prediction import Rates
from loraplex.simulator.cluster import PAGE_SIZE, Cluster, rates_of
from loraplex.simulator.fast_records import (
    ACCOUNT,
    ADAPTER,
    CANDIDATE,
    CHUNK,
    GROUP,
    PAIR,
    PLAN,
    REPLICA,
    REQUEST,
    SLOT,
    TENANT,
    VIEW,
)
from loraplex.simulator.types import FloatArray, IntArray, SimulationInput
from loraplex.simulator.workload import Workload

Records = npt.NDArray[Any]

_RATES = tuple(field.name for field in fields(Rates))

NONE = -1
REPORTED, SENT = np.uint8(1), np.uint8(2)


class Knobs(NamedTuple):
    max_step_tokens: int
    max_running: int
    max_unfinished: int
    prefix_cache: bool
    overdue_s: float
    prefill_cost: float
    decode_cost: float
    page_price: float
    ahead: int
    """Steps that are planned while another runs: 0 or 1."""
    turn_s: float
    decode_weight: float
    alike_s: float
    patience_s: float
    max_queued: int
    max_queue_wait_s: float
    fetches: bool
    """Adapters do not lie in host memory at the start."""


class State(NamedTuple):
    """P replicas, R requests, A adapters, T tenants (the last: none), G groups, C costs, K route keys, B bases."""

    wake_s: FloatArray
    """[P] when it is looked at next: when its run of steps ends, an adapter was fetched, or never."""
    load: npt.NDArray[np.int64]
    """[P] requests that were sent there and did not end."""
    seen: npt.NDArray[np.uint8]
    """[A, P] what the router knows of an adapter there: ``REPORTED`` as resident, ``SENT`` with a request."""
    views: Records
    """[P] of VIEW."""
    scores: FloatArray
    """[P] of the candidates of the request that is being routed."""
    mean_output: FloatArray
    """[B] tokens that the router expects of a request."""
    replicas: Records
    """[P]"""
    requests: Records
    """[R]"""
    pairs: Records
    """[A, P]"""
    tenants: Records
    """[P, T]"""
    slots: Records
    """[P, most unfinished]"""
    chunks: Records
    """[P, S, most running] of CHUNK: of the step that runs, and of the one planned after it. Of a pipeline those of
    step n are at n mod S: there are no fewer than steps may be in flight."""
    plans: Records
    """[P, S] of PLAN."""
    rows: npt.NDArray[np.int32]
    """[P, S, most running] requests that draw a token in a step of a pipeline; [0, 0, 0] where there is none."""
    phases: npt.NDArray[np.int64]
    """[P, PAGE_SIZE] decoding requests by (tokens at the start - 1 - step of the start) mod PAGE_SIZE: those of phase f
    need a page in each step n with (f + n) mod PAGE_SIZE = 0."""
    groups: Records
    """[G]"""
    coefficients: FloatArray
    """[C, 2, coefficients] of latency and interval."""
    adapters: Records
    """[C, A]"""
    first_candidate: IntArray
    """[K + 1]"""
    candidates: Records
    is_listed: npt.NDArray[np.bool_]
    """[K] the plan lists its adapter: among replicas that are alike weights decide, otherwise homes."""
    queue: IntArray
    """[B, most queued] requests that wait in the router, in order of arrival."""
    queue_size: npt.NDArray[np.int64]
    """[B]"""
    num_tenants_waiting: npt.NDArray[np.int64]
    """[B]"""
    accounts: Records
    """[B, T] of ACCOUNT."""
    num_active: npt.NDArray[np.int64]
    """[B] tenants with requests in the router or on replicas."""


def knobs_of(given: SimulationInput, cluster: Cluster) -> Knobs:
    engine, router = given.engine, given.router
    return Knobs(
        max_step_tokens=engine.max_step_tokens,
        max_running=engine.max_running,
        max_unfinished=engine.max_running + engine.max_waiting,
        prefix_cache=engine.prefix_cache,
        overdue_s=float(engine.overdue_s),
        prefill_cost=float(engine.prefill_token_cost),
        decode_cost=float(engine.decode_token_cost),
        page_price=float(engine.adapter_token_price * PAGE_SIZE),
        ahead=given.max_in_flight - 1,
        turn_s=float(given.turn_s),
        decode_weight=float(router.decode_weight),
        alike_s=float(router.alike_s),
        patience_s=np.inf if router.ttft_slo_s is None else float(router.ttft_slo_s * router.ttft_patience),
        max_queued=router.max_queued_requests,
        max_queue_wait_s=float(router.max_queue_wait_s),
        fetches=any(float(table.fetch_s.max(initial=0.0)) > 0 for table in cluster.tables),
    )


def state_of(given: SimulationInput, workload: Workload, cluster: Cluster, knobs: Knobs) -> State:
    """Nothing runs, nothing is resident."""
    num_replicas, num_adapters = len(cluster.replicas), len(workload.adapter_size)
    num_tenants = len(workload.arrivals.tenants) + 1
    num_bases = len(cluster.bases)
    tables = list({id(table): table for table in cluster.tables}.values())
    cost_of = {id(table): index for index, table in enumerate(tables)}
    steps = {id(t): r.cost.step for r, t in zip(cluster.replicas, cluster.tables, strict=True)}
    pairs = np.zeros((max(1, num_adapters), num_replicas), dtype=PAIR)
    if knobs.fetches:
        pairs["fetched_s"] = np.inf
    adapters = np.zeros((len(tables), max(1, num_adapters)), dtype=ADAPTER)
    most_stages = max((replica.shape.pp for replica in cluster.replicas), default=1)
    planned = (num_replicas, max(2, most_stages + knobs.ahead), knobs.max_running)
    groups = np.zeros(len(given.plan.groups), dtype=GROUP)
    groups["holder"] = NONE
    for index, table in enumerate(tables):
        for name in ADAPTER.names or ():
            adapters[name][index, :num_adapters] = getattr(table, name)[workload.adapter_size]
    return State(
        wake_s=np.full(num_replicas, np.inf),
        load=np.zeros(num_replicas, dtype=np.int64),
        seen=np.zeros((max(1, num_adapters), num_replicas), dtype=np.uint8),
        views=_views(given, cluster),
        scores=np.zeros(num_replicas),
        mean_output=np.full(num_bases, float(given.router.expected_output_tokens)),
        replicas=_replicas(given, cluster, cost_of),
        requests=_requests(workload, cluster),
        pairs=pairs,
        tenants=np.zeros((num_replicas, num_tenants), dtype=TENANT),
        slots=np.zeros((num_replicas, knobs.max_unfinished), dtype=SLOT),
        chunks=np.zeros(planned, dtype=CHUNK),
        plans=np.zeros(planned[:2], dtype=PLAN),
        rows=np.zeros(planned if most_stages > 1 else (0, 0, 0), dtype=np.int32),
        phases=np.zeros((num_replicas, PAGE_SIZE), dtype=np.int64),
        groups=groups,
        coefficients=_coefficients([steps[id(table)] for table in tables]),
        adapters=adapters,
        first_candidate=cluster.first_candidate,
        candidates=_candidates(workload, cluster),
        is_listed=cluster.is_listed,
        queue=np.zeros((num_bases, max(1, knobs.max_queued)), dtype=np.int32),
        queue_size=np.zeros(num_bases, dtype=np.int64),
        num_tenants_waiting=np.zeros(num_bases, dtype=np.int64),
        accounts=np.zeros((num_bases, num_tenants), dtype=ACCOUNT),
        num_active=np.zeros(num_bases, dtype=np.int64),
    )


def _replicas(given: SimulationInput, cluster: Cluster, cost_of: dict[int, int]) -> Records:
    records = np.zeros(len(cluster.replicas), dtype=REPLICA)
    groups = np.array([replica.group for replica in cluster.replicas])
    records["group"] = groups
    records["first_of_group"] = np.searchsorted(groups, groups, side="left")
    records["end_of_group"] = np.searchsorted(groups, groups, side="right")
    records["base"] = [replica.base for replica in cluster.replicas]
    records["cost"] = [cost_of[id(table)] for table in cluster.tables]
    records["num_stages"] = [replica.shape.pp for replica in cluster.replicas]
    records["alone_s"] = [replica.cost.step.alone_s for replica in cluster.replicas]
    records["num_pages"] = records["num_free"] = [replica.num_pages for replica in cluster.replicas]
    records["max_adapter_pages"] = records["num_pages"]
    if given.engine.max_adapter_bytes is not None:
        page_bytes = np.array([replica.cost.memory.page_bytes for replica in cluster.replicas])
        most = given.engine.max_adapter_bytes // page_bytes
        records["max_adapter_pages"] = np.minimum(most, records["num_pages"])
    records["max_context"] = [replica.cost.model.max_context_tokens for replica in cluster.replicas]
    for name in ("kv_head", "kv_tail", "idle_head", "idle_tail"):
        records[name] = NONE
    return records


def _views(given: SimulationInput, cluster: Cluster) -> Records:
    records = np.zeros(len(cluster.replicas), dtype=VIEW)
    for record, replica in zip(records, cluster.replicas, strict=True):
        rates = rates_of(given, replica)
        for name in _RATES:
            record[name] = getattr(rates, name)
        record["key"] = hash64(replica.replica_id.encode())
        record["room"] = replica.num_pages * PAGE_SIZE
    return records


def _requests(workload: Workload, cluster: Cluster) -> Records:
    arrivals = workload.arrivals
    records = np.zeros(len(workload), dtype=REQUEST)
    records["key"], records["base"] = cluster.request_key, cluster.request_base
    records["adapter"] = arrivals.adapter
    records["tenant"] = np.where(arrivals.tenant < 0, len(arrivals.tenants), arrivals.tenant)
    records["prompt"], records["output"] = arrivals.prompt_tokens, arrivals.output_tokens
    records["arrival_s"] = arrivals.arrival_s
    # Place NONE is the last one, of who has no adapter: their rows come first.
    row_order = np.zeros(len(workload.adapter_keys) + 1, dtype=np.int32)
    row_order[np.argsort(np.array(workload.adapter_keys, dtype=np.str_))] = np.arange(1, len(row_order))
    records["row_order"] = row_order[arrivals.adapter]
    records["first_s"] = records["end_s"] = np.inf
    for name in ("replica", "start_step", "previous", "next", "passed"):
        records[name] = NONE
    return records


def _coefficients(costs: list[StepCost]) -> FloatArray:
    """[C, 2, coefficients]: filled up with knots that no step reaches."""
    both = [(cost.latency, cost.interval) for cost in costs]
    most = max(len(one.token_knots) for pair in both for one in pair)

    def padded(one: StepCoefficients) -> FloatArray:
        num_knots = len(one.token_knots)
        scalars, knots, slopes = np.split(one.array(), (-2 * num_knots, -num_knots))
        missing = most - num_knots
        return np.concatenate([scalars, knots, np.full(missing, 1e18), slopes, np.zeros(missing)])

    return np.array([[padded(one) for one in pair] for pair in both])


def _candidates(workload: Workload, cluster: Cluster) -> Records:
    """Those of bases, which are always resident, need no home."""
    num_adapters = len(workload.adapter_keys)
    records = np.zeros(len(cluster.candidates), dtype=CANDIDATE)
    records["replica"], records["weight"] = cluster.candidates, cluster.weights
    keys = np.repeat(np.arange(len(cluster.first_candidate) - 1), np.diff(cluster.first_candidate))
    order = np.argsort(cluster.candidates, kind="stable")
    order = order[keys[order] < num_adapters]
    ends = np.searchsorted(cluster.candidates[order], np.arange(len(cluster.replicas) + 1))
    for index, replica in enumerate(cluster.replicas):
        chosen = order[ends[index] : ends[index + 1]]
        records["home"][chosen] = workload.affinities(replica.replica_id)[keys[chosen]] * cluster.weights[chosen]
    return records
