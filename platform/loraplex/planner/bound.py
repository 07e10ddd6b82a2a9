"""How much any plan could serve, and how few GPUs could do it: a linear programme over fractions of groups (HiGHS).

Groups, requests and their work are divisible, batches are ideal, memory does not bind and adapters cost nothing but
their arithmetic (``least_work``); requests are taken by classes of their length, each at the work of its cheapest. What
is good needs its whole work within the trace, and the work of its prompt by the TTFT target: that is held in the
busiest parts of the trace, everywhere else what arrives is served in time. Called by ``search``, ``report`` and
``study``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from loraplex.core.ids import BaseModelId
from loraplex.planner.capacity import Capacity
from loraplex.planner.least_work import LeastWork, least_work
from loraplex.planner.problem import Kind, Problem
from loraplex.simulator.types import CostKey, FloatArray, IntArray

_PROMPT_QUANTILES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_OUTPUT_QUANTILES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97)
_NUM_OUTPUTS = len(_OUTPUT_QUANTILES)
_WINDOW_S = 0.5
"""At most; at least a thousandth of a long target."""
_WINDOWS = 3
"""Of a busy part."""
_MAX_REACH = 8
"""Windows that a TTFT target may span; a longer one is held over the whole trace alone."""
_PARTS = 2
"""Busy parts, for each base."""
_LONGEST_S = 1e8
"""Stands for no end."""
_TOLERANCE = 1e-6
"""Of the solver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """Of one base: Q = prompts x outputs classes."""

    count: FloatArray
    """[Q]"""
    prompt: FloatArray
    """[Q] tokens of the shortest, like the next."""
    output: FloatArray
    busy: FloatArray
    """[parts, windows, prompts] requests that arrive in the busy parts."""
    reach: int
    """Windows after that of its arrival in which a prompt may still be worked on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Programme:
    problem: Problem
    window_s: float
    work_s: float
    """Between the first arrival and the last moment at which a good request may end."""
    demands: Mapping[BaseModelId, _Demand]
    work: Mapping[tuple[Kind, BaseModelId], LeastWork]
    """Of kinds that no other one equals for all that it serves."""


def attainment_bound(problem: Problem, capacity: Mapping[tuple[Kind, BaseModelId], Capacity]) -> float:
    """At most this share of the requests meets its targets."""
    served = _solve(_programme(problem, capacity), share=None)
    return min(1.0, served / len(problem.arrivals) + _TOLERANCE)


def gpus_bound(problem: Problem, capacity: Mapping[tuple[Kind, BaseModelId], Capacity], share: float) -> float:
    """Fewest GPUs (of all types together, as many of each as one likes) that serve ``share`` of the requests;
    infinite where no number of them does."""
    return _solve(_programme(problem, capacity), share=share)


def _programme(problem: Problem, capacity: Mapping[tuple[Kind, BaseModelId], Capacity]) -> _Programme:
    arrivals = problem.arrivals
    slos = [problem.slo_for(base) for base in problem.bases]
    times_s = arrivals.arrival_s - arrivals.arrival_s[0]
    ttft_s = min([_WINDOW_S, *(slo.ttft_s for slo in slos)])
    longest_s = max((slo.ttft_s for slo in slos if np.isfinite(slo.ttft_s)), default=0.0)
    window_s = max(ttft_s, longest_s / 1000, 1e-3)
    of_request = problem.base_of_requests()
    window = (times_s / window_s).astype(np.int32)
    starts = _busy_parts(problem, of_request, window)
    demands = {}
    for position, base in enumerate(problem.bases):
        rows: IntArray = np.flatnonzero(of_request == position).astype(np.int32)
        if len(rows):
            demands[base] = _demand(problem, rows, window[rows], starts, slos[position].ttft_s, window_s)
    work = {}
    for kind in dict.fromkeys(kind for kind, _ in capacity):
        for base in kind.bases:
            if base in demands:
                cost = problem.costs[CostKey(gpu=kind.gpu, base_model_id=base, shape=kind.shape)]
                one = demands[base]
                with_adapter = bool((arrivals.adapter[of_request == problem.bases.index(base)] >= 0).all())
                work[kind, base] = least_work(
                    cost, problem.engine, kind.shape.pp, one.prompt, one.output, with_adapter=with_adapter
                )
    targets_s = [
        slo.ttft_s + slo.tpot_s * float(np.max(arrivals.output_tokens[of_request == i], initial=1))
        for i, slo in enumerate(slos)
    ]
    return _Programme(
        problem=problem,
        window_s=window_s,
        work_s=min(float(times_s[-1]) + max(targets_s), _LONGEST_S),
        demands=demands,
        work=_undominated(problem, work),
    )


def _busy_parts(problem: Problem, of_request: IntArray, window: IntArray) -> IntArray:
    """[parts] first windows, ascending; the parts do not overlap."""
    count = int(window[-1]) + 1
    found: list[int] = []
    taken = np.zeros(count + _WINDOWS, dtype=np.bool_)
    for position in range(len(problem.bases)):
        chosen = of_request == position
        tokens = np.bincount(window[chosen], problem.arrivals.prompt_tokens[chosen], minlength=count)
        left = _PARTS
        for middle in np.argsort(-tokens, kind="stable").tolist():
            start = max(0, middle - 1)
            if left and not taken[start : start + _WINDOWS].any():
                taken[start : start + _WINDOWS] = True
                found.append(start)
                left -= 1
    return np.array(sorted(found), dtype=np.int32)


def _demand(
    problem: Problem, rows: IntArray, window: IntArray, starts: IntArray, ttft_s: float, window_s: float
) -> _Demand:
    prompt = problem.arrivals.prompt_tokens[rows].astype(np.float64)
    output = problem.arrivals.output_tokens[rows].astype(np.float64)
    of_prompt = np.searchsorted(np.quantile(prompt, _PROMPT_QUANTILES)[1:], prompt, side="right")
    of_output = np.searchsorted(np.quantile(output, _OUTPUT_QUANTILES)[1:], output, side="right")
    classes, size = of_prompt * _NUM_OUTPUTS + of_output, len(_PROMPT_QUANTILES) * _NUM_OUTPUTS
    least = np.full((2, size), np.inf)
    np.minimum.at(least[0], classes, prompt)
    np.minimum.at(least[1], classes, output)
    least[np.isinf(least)] = 1.0
    busy = np.zeros((len(starts), _WINDOWS, len(_PROMPT_QUANTILES)))
    part = np.searchsorted(starts, window, side="right") - 1
    later = window - starts[np.maximum(part, 0)]
    inside = (part >= 0) & (later < _WINDOWS)
    np.add.at(busy, (part[inside], later[inside], of_prompt[inside]), 1.0)
    reach = ceil(min(ttft_s / window_s, _MAX_REACH + 1))
    if reach > _MAX_REACH:
        busy[:], reach = 0.0, 0
    return _Demand(
        count=np.bincount(classes, minlength=size).astype(np.float64),
        prompt=least[0],
        output=least[1],
        busy=busy,
        reach=reach,
    )


def _undominated(
    problem: Problem, work: Mapping[tuple[Kind, BaseModelId], LeastWork]
) -> dict[tuple[Kind, BaseModelId], LeastWork]:
    """Without kinds that another one, of as many bases or more, betters in every class per GPU."""
    kinds = list(dict.fromkeys(kind for kind, _ in work))

    def figures(kind: Kind, base: BaseModelId) -> FloatArray:
        one = work[kind, base]
        is_late = one.alone_s > problem.slo_for(base).ttft_s
        size = kind.shape.num_ranks
        return np.concatenate(
            [np.where(is_late, np.inf, size * one.prompt_s), np.where(is_late, np.inf, size * one.answer_s)]
        )

    kept: list[Kind] = []
    for index, kind in enumerate(kinds):
        bases = [base for of, base in work if of == kind]
        rivals = [
            other
            for place, other in enumerate(kinds)
            if other != kind
            and other.gpu == kind.gpu
            and set(bases) <= set(other.bases)
            and all(
                (figures(other, base) <= figures(kind, base)).all()
                and (
                    place < index or set(bases) < set(other.bases) or (figures(other, base) < figures(kind, base)).any()
                )
                for base in bases
            )
        ]
        if not rivals:
            kept.append(kind)
    return {key: one for key, one in work.items() if key[0] in kept}


def _solve(programme: _Programme, *, share: float | None) -> float:
    """``share`` None: the most requests served on the nodes. Else: the fewest GPUs for this share."""
    problem = programme.problem
    kinds = list(dict.fromkeys(kind for kind, _ in programme.work))
    types = list(dict.fromkeys(node.gpu for node in problem.nodes))
    rows = _Rows()
    devices = [rows.limit(float(sum(node.num_gpus for node in problem.nodes if node.gpu == gpu))) for gpu in types]
    whole = {kind: rows.limit(0.0) for kind in kinds}
    num_parts = len(next(iter(programme.demands.values())).busy)
    reach = max(one.reach for one in programme.demands.values())
    in_part = {
        (kind, part, window): rows.limit(0.0)
        for kind in kinds
        for part in range(num_parts)
        for window in range(_WINDOWS + reach)
    }
    for kind in kinds:
        entries = [(whole[kind], -programme.work_s)]
        if share is None:
            entries.append((devices[types.index(kind.gpu)], float(kind.shape.num_ranks)))
        entries += [(row, -programme.window_s) for (of, _, _), row in in_part.items() if of == kind]
        rows.column(0.0 if share is None else float(kind.shape.num_ranks), entries)
    enough = None if share is None else rows.limit(-share * len(problem.arrivals))
    for base, demand in programme.demands.items():
        _add_base(programme, rows, base, demand, whole, in_part, enough)
    return rows.solved(maximise=share is None)


def _add_base(
    programme: _Programme,
    rows: "_Rows",
    base: BaseModelId,
    demand: _Demand,
    whole: Mapping[Kind, int],
    in_part: Mapping[tuple[Kind, int, int], int],
    enough: int | None,
) -> None:
    ttft_s = programme.problem.slo_for(base).ttft_s
    num_parts, _, num_prompts = demand.busy.shape
    of_class = [rows.limit(count) for count in demand.count.tolist()]
    # Served in all, of one class of prompts, at most those outside the busy parts and those served in them.
    linked = [
        rows.limit(float(demand.count.reshape(num_prompts, -1)[q].sum() - demand.busy[:, :, q].sum()))
        for q in range(num_prompts)
    ]
    arrived = {
        (part, window, q): rows.limit(float(demand.busy[part, window, q]))
        for part in range(num_parts)
        for window in range(_WINDOWS)
        for q in range(num_prompts)
        if demand.busy[part, window, q] > 0
    }
    for (kind, of), work in programme.work.items():
        if of != base:
            continue
        for q in np.flatnonzero((work.alone_s <= ttft_s) & (demand.count > 0)).tolist():
            entries = [
                (of_class[q], 1.0),
                (linked[q // _NUM_OUTPUTS], 1.0),
                (whole[kind], float(work.prompt_s[q] + work.answer_s[q])),
            ]
            if enough is not None:
                entries.append((enough, -1.0))
            rows.column(-1.0 if enough is None else 0.0, entries)
        seconds = work.prompt_s.reshape(num_prompts, -1).min(axis=1)
        on_time: list[bool] = np.any(work.alone_s.reshape(num_prompts, -1) <= ttft_s, axis=1).tolist()
        for (part, window, q), row in arrived.items():
            if on_time[q]:
                for later in range(demand.reach + 1):
                    at = in_part[kind, part, window + later]
                    rows.column(0.0, [(row, 1.0), (at, float(seconds[q])), (linked[q], -1.0)])


class _Rows:
    """A linear programme that grows by rows (at most a limit) and columns (not negative)."""

    def __init__(self) -> None:
        self._limits: list[float] = []
        self._cost: list[float] = []
        self._entries: tuple[list[int], list[int], list[float]] = ([], [], [])

    def limit(self, most: float) -> int:
        self._limits.append(most)
        return len(self._limits) - 1

    def column(self, cost: float, entries: list[tuple[int, float]]) -> None:
        for row, value in entries:
            self._entries[0].append(row)
            self._entries[1].append(len(self._cost))
            self._entries[2].append(value)
        self._cost.append(cost)

    def solved(self, *, maximise: bool) -> float:
        """The optimum; infinite where there is none."""
        rows, columns, values = self._entries
        shape = len(self._limits), len(self._cost)
        matrix = coo_array((values, (rows, columns)), shape=shape).tocsr()
        solution = linprog(self._cost, A_ub=matrix, b_ub=np.array(self._limits), bounds=(0, None), method="highs")
        if not solution.success:
            return float("inf")
        return float(-solution.fun if maximise else solution.fun)
