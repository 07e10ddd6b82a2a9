"""How much any plan could serve, and how few GPUs could do it: a linear programme over fractions of groups (HiGHS).

A fluid view at mean lengths (``capacity``): groups and requests are divisible, adapters cost what full batches of
distinct ones cost, and what arrives in a window, which is no shorter than a request may take, is served in it or the
next. Not a proof for one trace: requests shorter than the mean could be preferred. Called by ``search`` and ``report``.
"""

from collections.abc import Mapping

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from loraplex.core.ids import BaseModelId
from loraplex.planner.capacity import Capacity
from loraplex.planner.problem import Kind, Problem
from loraplex.simulator.types import FloatArray

_MAX_WINDOWS = 60
_LEAST_WINDOW_S = 1.0


def attainment_bound(problem: Problem, capacity: Mapping[tuple[Kind, BaseModelId], Capacity]) -> float:
    """At most this share of the requests meets its targets."""
    arrivals = _arrivals(problem)
    served = _solve(problem, capacity, arrivals, share=None)
    return min(1.0, served / max(1.0, float(arrivals.sum())))


def gpus_bound(problem: Problem, capacity: Mapping[tuple[Kind, BaseModelId], Capacity], share: float) -> float:
    """Fewest GPUs (of all types together, as many of each as one likes) that serve ``share`` of the requests."""
    return _solve(problem, capacity, _arrivals(problem), share=share)


def _arrivals(problem: Problem) -> FloatArray:
    """[B, W] requests."""
    times_s = problem.arrivals.arrival_s - problem.arrivals.arrival_s[0]
    window = (times_s / _window_s(problem)).astype(np.int64)
    of_request, count = problem.base_of_requests(), int(window[-1]) + 1
    return np.array(
        [np.bincount(window[of_request == b], minlength=count) for b in range(len(problem.bases))], dtype=np.float64
    )


def _window_s(problem: Problem) -> float:
    """A part of the trace, but no shorter than the longest that a request within its targets takes, on average."""
    arrivals = problem.arrivals
    span_s = float(arrivals.arrival_s[-1] - arrivals.arrival_s[0])
    slos = [problem.slo_for(base) for base in problem.bases]
    output = float(arrivals.output_tokens.mean())
    takes_s = max(min(slo.ttft_s, span_s) + min(slo.tpot_s * output, span_s) for slo in slos)
    return max(_LEAST_WINDOW_S, span_s / _MAX_WINDOWS, takes_s)


def _solve(
    problem: Problem,
    capacity: Mapping[tuple[Kind, BaseModelId], Capacity],
    arrivals: FloatArray,
    *,
    share: float | None,
) -> float:
    """``share`` None: the most requests served on the nodes. Else: the fewest GPUs for this share."""
    kinds = tuple(dict.fromkeys(kind for kind, _ in capacity))
    types = tuple(dict.fromkeys(node.gpu for node in problem.nodes))
    window_s, num_windows = _window_s(problem), arrivals.shape[1]
    work_windows = num_windows + 1
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    limits: list[float] = []
    # Columns: groups of each kind, then requests by (kind, base, window).
    for gpu in types:
        for index, kind in enumerate(kinds):
            if kind.gpu == gpu and share is None:
                rows.append(len(limits))
                columns.append(index)
                values.append(float(kind.shape.num_ranks))
        limits.append(float(sum(node.num_gpus for node in problem.nodes if node.gpu == gpu)))
    time_row, arrival_row = len(limits), len(limits) + len(kinds) * work_windows
    for index in range(len(kinds)):
        for w in range(work_windows):
            rows.append(time_row + index * work_windows + w)
            columns.append(index)
            values.append(-window_s)
    limits += [0.0] * (len(kinds) * work_windows)
    limits += arrivals.ravel().tolist()
    column = len(kinds)
    for index, kind in enumerate(kinds):
        for base in kind.bases:
            one = capacity[kind, base]
            if one.requests_per_s <= 0:
                continue
            arrival = arrival_row + problem.bases.index(base) * num_windows
            for w in range(num_windows):
                for later in (0, 1):
                    rows += [time_row + index * work_windows + w + later, arrival + w]
                    columns += [column, column]
                    values += [one.request_s, 1.0]
                    column += 1
    cost = np.zeros(column)
    if share is None:
        cost[len(kinds) :] = -1.0
    else:
        cost[: len(kinds)] = [kind.shape.num_ranks for kind in kinds]
        rows += [len(limits)] * (column - len(kinds))
        columns += list(range(len(kinds), column))
        values += [-1.0] * (column - len(kinds))
        limits.append(-share * float(arrivals.sum()))
    matrix = coo_array((values, (rows, columns)), shape=(len(limits), column)).tocsr()
    solution = linprog(cost, A_ub=matrix, b_ub=np.array(limits), bounds=(0, None), method="highs")
    if not solution.success:
        return float("inf")
    return float(-solution.fun if share is None else solution.fun)
