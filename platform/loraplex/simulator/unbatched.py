"""AlpaServe's contract as a way of serving a plan: both simulators with batch and output length 1 and no KV.

The router's part is the same (the contract's dispatch and admission, by predicted end). ``simulate_unbatched`` trusts
its prediction; ``simulate_unbatched_exact`` runs what was accepted through real engines, one per base and group, on
pipelines of virtual stages, and reports when it ended. Called by ``fast`` and ``exact``.
"""

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from loraplex.core.errors import InvalidInput
from loraplex.core.ids import RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.core.step import ArenaSpec, SampledToken, StepPlan, StepResult
from loraplex.engine import Engine, EngineConfig
from loraplex.simulator.alpaserve import Indices, Seconds, StageSeconds, dispatch
from loraplex.simulator.cluster import PAGE_SIZE, Cluster, Replica
from loraplex.simulator.compiled import compiled
from loraplex.simulator.results import Happened
from loraplex.simulator.types import Outcome, SimulationInput
from loraplex.simulator.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """Route keys as the contract's models, groups as its groups."""

    slo_s: Seconds
    """[K]"""
    first_host: Indices
    hosts: Indices
    num_stages: Indices
    """[G]"""
    stage_s: StageSeconds
    """[G, K, most stages]"""
    replica: Indices
    """[G, K] index of the replica that serves a key on a group."""


def simulate_unbatched(given: SimulationInput, workload: Workload, cluster: Cluster) -> Happened:
    """By the contract alone. InvalidInput when a replica's cost has not one time for each of its stages."""
    tables = _tables(given, cluster)
    group, end_s = _dispatch_all(given, workload, cluster, tables)
    return _happened(given, cluster, tables, group, end_s, end_s)


def simulate_unbatched_exact(given: SimulationInput, workload: Workload, cluster: Cluster) -> Happened:
    """The same requests, through engines. InvalidInput as ``simulate_unbatched``."""
    tables = _tables(given, cluster)
    group, predicted_s = _dispatch_all(given, workload, cluster, tables)
    arrival_s = workload.arrivals.arrival_s
    pipelines = [
        _Pipeline(cluster, tables, index, depth=_most_at_once(arrival_s[group == index], predicted_s[group == index]))
        for index in range(len(given.plan.groups))
    ]
    end_s = np.full(len(workload), np.inf)
    events: list[tuple[float, int]] = []
    rows = deque(np.flatnonzero(group >= 0).tolist())
    while rows or events:
        if rows and (not events or arrival_s[rows[0]] <= events[0][0]):
            row = rows.popleft()
            now_s, index = float(arrival_s[row]), int(group[row])
            pipelines[index].waiting.append((row, int(cluster.request_key[row])))
        else:
            now_s, index = heapq.heappop(events)
        for done, at_s in pipelines[index].collect(now_s):
            end_s[done] = at_s
        for wake_s in pipelines[index].start(now_s):
            heapq.heappush(events, (wake_s, index))
    return _happened(given, cluster, tables, group, predicted_s, end_s)


class _Pipeline:
    """One group: a queue in order of arrival, an engine for each base, a clock for each stage."""

    def __init__(self, cluster: Cluster, tables: _Tables, group: int, *, depth: int) -> None:
        """``depth``: requests that are there at once, at most. Between two stages any number may wait."""
        self._cluster, self._tables, self._group = cluster, tables, group
        self._clocks = [0.0] * int(tables.num_stages[group])
        config = EngineConfig(max_running=depth, max_step_tokens=depth, prefix_cache=False)
        self._engines = {
            index: Engine(config, model=replica.cost.model, arena=_arena(replica, depth))
            for index, replica in enumerate(cluster.replicas)
            if replica.group == group
        }
        self.waiting: deque[tuple[int, int]] = deque()
        """(row, route key) that stage 0 has not begun."""
        self._under_way: deque[tuple[float, int, StepPlan]] = deque()

    def start(self, now_s: float) -> list[float]:
        """Begins what the first stage has room for; when to look again."""
        wake_s = []
        while self.waiting and self._clocks[0] <= now_s:
            row, key = self.waiting.popleft()
            index = int(self._tables.replica[self._group, key])
            engine = self._engines[index]
            engine.add(self._request(row, index, now_s), now_s)
            plan = engine.schedule(now_s).plan
            assert plan is not None, "an engine with room did not plan its only request"
            assert len(plan.rows) == 1, "an unbatched step holds several requests"
            at_s = now_s
            for stage in range(len(self._clocks)):
                at_s = max(at_s, self._clocks[stage]) + float(self._tables.stage_s[self._group, key, stage])
                self._clocks[stage] = at_s
            self._under_way.append((at_s, index, plan))
            wake_s.append(at_s)
        if self.waiting:
            wake_s.append(self._clocks[0])
        return wake_s

    def collect(self, now_s: float) -> list[tuple[int, float]]:
        """(row, when it ended) of the steps that are done."""
        done = []
        while self._under_way and self._under_way[0][0] <= now_s:
            at_s, index, plan = self._under_way.popleft()
            tokens = (SampledToken(slot=plan.rows[0].slot, token_id=0),)
            result = StepResult(step_id=plan.step_id, tokens=tokens, duration_s=0.0)
            (output,) = self._engines[index].complete(result, at_s)
            assert output.finish_reason is not None, "a request of one token went on"
            done.append((int(output.request_id), at_s))
        return done

    def _request(self, row: int, index: int, now_s: float) -> EngineRequest:
        return EngineRequest(
            request_id=RequestId(str(row)),
            tenant=TenantName(""),
            base_model_id=self._cluster.bases[self._cluster.replicas[index].base],
            adapter=None,
            prompt_token_ids=(0,),
            sampling=SamplingParams(max_tokens=1, seed=0, ignore_eos=True),
            arrival_s=now_s,
            cache_salt="",
        )


def _most_at_once(from_s: Seconds, until_s: Seconds) -> int:
    """Of intervals, sorted by their start; 1 where there are none."""
    ended = np.searchsorted(np.sort(until_s), from_s, side="right")
    return int(np.max(np.arange(1, len(from_s) + 1) - ended, initial=1))


def _arena(replica: Replica, depth: int) -> ArenaSpec:
    """Room for ``depth`` requests of one page and the scheduler's reserve: KV decides nothing here."""
    return ArenaSpec(num_pages=2 * depth, page_size=PAGE_SIZE, page_bytes=replica.cost.memory.page_bytes)


def _tables(given: SimulationInput, cluster: Cluster) -> _Tables:
    num_keys, num_groups = len(cluster.first_candidate) - 1, len(given.plan.groups)
    num_stages = np.array([group.shape.pp for group in given.plan.groups], dtype=np.int32)
    stage_s = np.zeros((num_groups, num_keys, int(num_stages.max())), dtype=np.float32)
    replica_of = np.full((num_groups, num_keys), -1, dtype=np.int32)
    keys = np.repeat(np.arange(num_keys), np.diff(cluster.first_candidate))
    for index, replica in enumerate(cluster.replicas):
        if len(replica.cost.stage_s) != replica.shape.pp:
            raise InvalidInput(
                f"{replica.replica_id}: unbatched serving needs a time for each of {replica.shape.pp} stages, "
                f"not {len(replica.cost.stage_s)}",
                param="costs",
            )
        served = keys[cluster.candidates == index]
        stage_s[replica.group, served, : replica.shape.pp] = replica.cost.stage_s
        replica_of[replica.group, served] = index
    slo_s = np.full(num_keys, np.inf)
    slo_s[cluster.request_key] = cluster.slo_ttft_s
    return _Tables(
        slo_s=slo_s,
        first_host=cluster.first_candidate,
        hosts=np.array([replica.group for replica in cluster.replicas], dtype=np.int32)[cluster.candidates],
        num_stages=num_stages,
        stage_s=stage_s,
        replica=replica_of,
    )


def _dispatch_all(
    given: SimulationInput, workload: Workload, cluster: Cluster, tables: _Tables
) -> tuple[Indices, Seconds]:
    """([R] group or -1, [R] predicted end)."""
    group = np.full(len(workload), -1, dtype=np.int32)
    end_s = np.full(len(workload), np.inf)
    _dispatch_rows(
        workload.arrivals.arrival_s,
        cluster.request_key,
        tables.slo_s,
        given.overhead_s,
        tables.first_host,
        tables.hosts,
        tables.num_stages,
        tables.stage_s,
        group,
        end_s,
    )
    return group, end_s


@compiled
def _dispatch_rows(
    arrival_s: Seconds,
    key: Indices,
    slo_s: Seconds,
    overhead_s: float,
    first_host: Indices,
    hosts: Indices,
    num_stages: Indices,
    stage_s: StageSeconds,
    group: Indices,
    end_s: Seconds,
) -> None:
    """Writes ``group`` and ``end_s`` [R]."""
    clocks = np.zeros((len(num_stages), stage_s.shape[2]), dtype=np.float64)
    ends = np.empty(stage_s.shape[2], dtype=np.float64)
    for row in range(len(arrival_s)):
        k = key[row]
        group[row], end_s[row] = dispatch(
            arrival_s[row], k, slo_s[k], overhead_s, first_host, hosts, num_stages, stage_s, clocks, ends
        )


def _happened(
    given: SimulationInput, cluster: Cluster, tables: _Tables, group: Indices, predicted_s: Seconds, end_s: Seconds
) -> Happened:
    served = group >= 0
    key = cluster.request_key
    replica = np.where(served, tables.replica[group, key], -1).astype(np.int32)
    hosted = np.diff(cluster.first_candidate)[key] > 0
    num_replicas = len(cluster.replicas)
    # A group is in a step while its slowest stage is: the others wait for it.
    slowest_s = tables.stage_s[group, key].max(axis=1).astype(np.float64)
    counts = np.bincount(replica[served], minlength=num_replicas)
    none = np.zeros(num_replicas, dtype=np.int64)
    assert np.array_equal(np.isfinite(end_s), np.isfinite(predicted_s)), "what was accepted did not end"
    return Happened(
        first_s=end_s,
        end_s=end_s,
        num_output=served.astype(np.int32),
        outcome=np.where(served, Outcome.SERVED, np.where(hosted, Outcome.REFUSED, Outcome.IMPOSSIBLE)).astype(np.int8),
        replica=replica,
        busy_s=np.bincount(replica[served], weights=slowest_s[served], minlength=num_replicas).astype(np.float64),
        num_steps=counts,
        num_preemptions=none,
        num_loads=none,
        load_bytes=np.zeros(num_replicas),
    )
