"""What the fast simulator keeps of replicas, requests and adapters: arrays of records, as compiled code takes them.

Owns the layout and its beginning; ``fast_memory``, ``fast_scheduler`` and ``fast_router`` change it. Steps of a replica
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
from loraplex.simulator.types import FloatArray, IntArray, SimulationInput
from loraplex.simulator.workload import Workload

Records = npt.NDArray[Any]

_RATES = tuple(field.name for field in fields(Rates))

NONE = -1

REPLICA = np.dtype(
    [
        # The plan's.
        ("base", np.int32),
        ("cost", np.int32),
        ("group", np.int32),
        ("first_of_group", np.int32),
        ("end_of_group", np.int32),
        ("num_stages", np.int32),
        ("num_pages", np.int64),
        ("max_adapter_pages", np.int64),
        ("max_context", np.int64),
        # Time.
        ("step", np.int64),  # The last that is done.
        ("slot", np.int64),  # Of the plan of the step that runs.
        ("running", np.bool_),
        ("blocked", np.bool_),  # No step is planned ahead since pages lack.
        ("fetch_free_s", np.float64),
        # A run of ``run_count`` steps of one composition, after step ``step``, begins at ``run_start_s``; the first
        # takes ``run_step_s``, each later one ``run_slope_s`` more than the one before.
        ("run_count", np.int64),
        ("run_start_s", np.float64),
        ("run_step_s", np.float64),
        ("run_slope_s", np.float64),
        # Requests.
        ("num_running", np.int64),
        ("num_waiting", np.int64),
        ("num_prefilling", np.int64),
        ("num_decoding", np.int64),
        ("decode_offset", np.int64),  # Sum over the decoding of (tokens at the start - step of the start).
        ("decode_lora", np.int64),
        ("decode_adapters", np.int64),
        ("decode_bytes", np.float64),
        ("num_ends", np.int64),
        ("num_fresh", np.int64),
        # Pages.
        ("num_free", np.int64),
        ("num_cached", np.int64),
        ("num_idle", np.int64),
        ("num_adapter_pages", np.int64),
        ("paged_step", np.int64),  # Pages are taken for all tokens up to this step.
        ("kv_head", np.int64),
        ("kv_tail", np.int64),
        ("idle_head", np.int64),
        ("idle_tail", np.int64),
        ("stamp", np.int64),
        # Fairness.
        ("num_tenants", np.int64),
        # Figures.
        ("busy_s", np.float64),
        ("num_steps", np.int64),
        ("num_preemptions", np.int64),
        ("num_loads", np.int64),
        ("num_loaded_pages", np.int64),
    ],
    align=True,
)

REQUEST = np.dtype(
    [
        ("key", np.int32),
        ("base", np.int32),
        ("adapter", np.int32),
        ("tenant", np.int32),
        ("replica", np.int32),
        ("outcome", np.int32),
        ("prompt", np.int32),
        ("output", np.int32),
        ("generated", np.int32),  # Before it was admitted last.
        ("known", np.int32),  # Tokens to compute when it was admitted last.
        ("scheduled", np.int32),
        ("planned", np.int32),  # Steps, planned and not done, that hold a chunk of it.
        ("position", np.int32),  # In its replica's list of running requests.
        ("charged", np.int32),  # Tokens whose prefill its tenant has paid for.
        ("cached", np.int32),  # Pages of its KV that are kept though it does not run.
        ("previous", np.int32),
        ("next", np.int32),
        ("start_step", np.int64),  # Of decoding; NONE while it prefills.
        ("last_step", np.int64),
        ("passed", np.int64),  # Stamp of the plan that passed it over.
        ("stamp", np.int64),
        ("arrival_s", np.float64),
        ("since_s", np.float64),
        ("first_s", np.float64),
        ("end_s", np.float64),
        ("predicted", np.float64),  # Output tokens that its tenant paid for when it was sent.
        ("token_service_s", np.float64),  # What each of them costs.
    ],
    align=True,
)

PAIR = np.dtype(
    [
        ("users", np.int32),
        ("decoding", np.int32),
        ("sent", np.int32),
        ("marked", np.int64),  # Step in which it was counted.
        ("previous", np.int32),
        ("next", np.int32),
        ("stamp", np.int64),
        ("resident", np.bool_),
        ("fetched_s", np.float64),  # When it lies in host memory; infinite: not asked for.
    ],
    align=True,
)
"""An adapter on a replica."""

TENANT = np.dtype(
    [
        ("counter", np.float64),  # Of service, but for decoding: that adds num_decoding * (cost of a token) per step.
        ("num_decoding", np.int64),
        ("num_active", np.int64),
        ("position", np.int64),
        ("active", np.int64),  # Not of this tenant: the tenant at this place of the replica's list of active ones.
    ],
    align=True,
)
"""A tenant on a replica."""

ACCOUNT = np.dtype(
    [
        ("seconds", np.float64),
        ("num_active", np.int64),
        ("num_waiting", np.int64),
        ("position", np.int64),
        ("active", np.int64),  # Not of this tenant, as in TENANT.
    ]
)
"""A tenant of a base, in the router."""

SLOT = np.dtype(
    [
        ("running", np.int32),
        ("waiting", np.int32),
        ("prefilling", np.int32),  # In order of admission.
        ("fresh", np.int32),  # Adapters loaded since the router heard last.
        ("end_request", np.int64),  # A heap of the decoding requests by their last step.
        ("end_step", np.int64),
    ]
)
"""One place of each of a replica's lists."""

GROUP = np.dtype([("device_free_s", np.float64), ("link_free_s", np.float64)])
ADAPTER = np.dtype([("pages", np.int64), ("whole_bytes", np.float64), ("load_s", np.float64), ("fetch_s", np.float64)])
"""An adapter on a replica of one cost, as in ``AdapterTable``."""
CANDIDATE = np.dtype([("replica", np.int64), ("weight", np.float64), ("home", np.float64)])
"""``home``: the router's affinity of a cold adapter."""

VIEW = np.dtype(
    [
        ("queued", np.float64),
        ("prompts", np.float64),
        ("room", np.float64),
        ("step_s", np.float64),
        ("prefill_s", np.float64),
        ("row_s", np.float64),
        ("context_token_s", np.float64),
        ("token_s", np.float64),
        ("free_tokens", np.float64),
        ("max_step_tokens", np.float64),
        ("max_running", np.float64),
        ("key", np.uint64),
    ]
)
"""What the router knows of a replica: prompt tokens to compute, the prompts of all that are there, and the tokens for
which there were pages when it heard last; then its ``Rates``, and the hash of its id."""

CHUNK = np.dtype([("request", np.int64), ("count", np.int64)])
PLAN = np.dtype(
    [
        ("size", np.int64),
        ("rows", np.float64),
        ("tokens", np.float64),
        ("pairs", np.float64),
        ("single_rows", np.float64),
        ("kv_tokens", np.float64),
        ("lora_tokens", np.float64),
        ("ready_s", np.float64),
    ]
)
"""The chunks of a planned step, summed; ``ready_s``: when the adapters that it loads are there."""


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
    seen: npt.NDArray[np.bool_]
    """[A, P] whether the router knows of an adapter that it is resident."""
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
    """[P, 2, most running] of CHUNK: of the step that runs, and of the one planned after it."""
    plans: Records
    """[P, 2] of PLAN."""
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
        page_price=float(engine.adapter_page_price),
        ahead=given.max_in_flight - 1,
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
    for index, table in enumerate(tables):
        for name in ADAPTER.names or ():
            adapters[name][index, :num_adapters] = getattr(table, name)[workload.adapter_size]
    return State(
        wake_s=np.full(num_replicas, np.inf),
        load=np.zeros(num_replicas, dtype=np.int64),
        seen=np.zeros((max(1, num_adapters), num_replicas), dtype=np.bool_),
        views=_views(given, cluster),
        scores=np.zeros(num_replicas),
        mean_output=np.full(num_bases, float(given.router.expected_output_tokens)),
        replicas=_replicas(given, cluster, cost_of),
        requests=_requests(workload, cluster),
        pairs=pairs,
        tenants=np.zeros((num_replicas, num_tenants), dtype=TENANT),
        slots=np.zeros((num_replicas, knobs.max_unfinished), dtype=SLOT),
        chunks=np.zeros((num_replicas, 2, knobs.max_running), dtype=CHUNK),
        plans=np.zeros((num_replicas, 2), dtype=PLAN),
        phases=np.zeros((num_replicas, PAGE_SIZE), dtype=np.int64),
        groups=np.zeros(len(given.plan.groups), dtype=GROUP),
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
    records["num_pages"] = records["num_free"] = [replica.num_pages for replica in cluster.replicas]
    records["max_adapter_pages"] = given.engine.max_adapter_pages or records["num_pages"]
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
