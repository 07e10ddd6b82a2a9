"""How many requests any placement could serve under AlpaServe's contract: a linear programme, solved by HiGHS.

Fluid relaxation: groups may be fractions, requests too, memory does not bind, and of each layout only its busiest
stage is counted. Arrivals of a window are worked on from then until the SLO after the window's end.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import coo_array

from loraplex.planner.alpaserve.problem import Problem, lone_latency_s

_MAX_WINDOWS = 300
_MIN_WINDOW_S = 0.25
_TOLERANCE = 1e-6
"""Of the solver."""
_MAX_REACH = 20
"""Windows that the longest SLO may span."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """Models of one type and SLO: the bound does not tell them apart."""

    slo_s: float
    model: int
    """One of them."""
    arrivals: npt.NDArray[np.float64]
    """[W] counted requests per window."""


def goodput_bound(problem: Problem) -> float:
    """At least the goodput of every placement; 1 when nothing binds."""
    work = problem.work
    scored = work.scored()
    times_s, models = work.arrival_s[scored], work.model[scored]
    if not len(times_s):
        return 1.0
    span_s = float(times_s[-1] - times_s[0])
    window_s = max(_MIN_WINDOW_S, span_s / _MAX_WINDOWS, float(work.slo_s.max()) / _MAX_REACH)
    num_windows = int(span_s / window_s) + 1
    window = ((times_s - times_s[0]) / window_s).astype(np.int64)
    classes: dict[tuple[str, float], _Class] = {}
    for model, model_type in enumerate(work.model_types):
        arrivals = np.bincount(window[models == model], minlength=num_windows).astype(np.float64)
        key = (model_type, float(work.slo_s[model]))
        known = classes.get(key)
        if known is None:
            classes[key] = _Class(slo_s=key[1], model=model, arrivals=arrivals)
        else:
            np.add(known.arrivals, arrivals, out=known.arrivals)
    return min(1.0, _solve(problem, list(classes.values()), window_s, num_windows) / len(times_s) + _TOLERANCE)


def _solve(problem: Problem, classes: list[_Class], window_s: float, num_windows: int) -> float:
    num_layouts = len(problem.layouts)
    stages: list[int] = problem.stage_s.sum(axis=1).argmax(axis=1).tolist()
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    # Columns: groups of each layout, then requests of (class, layout, window of arrival, window of work).
    column: int = num_layouts
    # Rows: devices; the time of each layout in each window; the arrivals of each class in each window.
    time_row = 1
    num_work_windows = num_windows + 1 + max(_reach(one.slo_s, window_s, num_windows) for one in classes)
    arrival_row = time_row + num_layouts * num_work_windows
    for index in range(num_layouts):
        rows.append(0)
        columns.append(index)
        values.append(float(problem.num_gpus[index]))
        for w in range(num_work_windows):
            rows.append(time_row + index * num_work_windows + w)
            columns.append(index)
            values.append(-window_s)
    limits = [float(problem.num_devices)] + [0.0] * (num_layouts * num_work_windows)
    for number, one in enumerate(classes):
        reach = _reach(one.slo_s, window_s, num_windows)
        for index in range(num_layouts):
            stage_s = problem.stage_s[index, one.model]
            if not stage_s.any() or lone_latency_s(stage_s) > one.slo_s:
                continue
            for w in np.flatnonzero(one.arrivals).tolist():
                for later in range(reach + 1):
                    rows += [
                        time_row + index * num_work_windows + w + later,
                        arrival_row + number * num_windows + w,
                    ]
                    columns += [column, column]
                    values += [float(stage_s[stages[index]]), 1.0]
                    column += 1
        limits += one.arrivals.tolist()
    if column == num_layouts:
        return 0.0
    cost = np.zeros(column)
    cost[num_layouts:] = -1.0
    matrix = coo_array((values, (rows, columns)), shape=(len(limits), column)).tocsr()
    solution = linprog(cost, A_ub=matrix, b_ub=np.array(limits), bounds=(0, None), method="highs")
    return float(-solution.fun) if solution.success else float("inf")


def _reach(slo_s: float, window_s: float, num_windows: int) -> int:
    """Windows after that of its arrival in which a request may still be worked on."""
    return min(num_windows, int(np.ceil(slo_s / window_s)))
