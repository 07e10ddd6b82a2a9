"""How fast a machine ran through a run, by the steps that it took: a clock that stands while the machine does.

A shared machine is faster at one moment than at the next, for seconds at a time: its cores' other tenants share caches
and memory with it, or the cores themselves. On the clock of its own work every step takes what it costs. Pure. Called
by ``simulated``.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from loraplex.cost.ceilings import FloatArray
from loraplex.loadgen.outcomes import Outcomes
from loraplex.loadgen.prediction import outcomes_of
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.types import SimulationInput

_LEAST_USE = 0.1
"""A window in which the steps take less than this share tells nothing: the machine keeps its mean pace."""
_FOREVER_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """One pace in each of W windows; seconds from the run's start."""

    slowness: FloatArray
    """(W,) what steps took over what they cost."""
    clock_s: FloatArray
    """(W + 2,) ends of the windows, from 0 on, and the end of all time."""
    work_s: FloatArray
    """(W + 2,) the same moments on the work's clock."""

    @classmethod
    def of(cls, start_s: FloatArray, took_s: FloatArray, cost_s: FloatArray, *, window_s: float) -> Self:
        """Of S steps, (S,) each, the times after the run's start. ``cost_s``: what each was expected to take."""
        count = int(np.ceil((start_s + took_s).max(initial=0.0) / window_s))
        edges = window_s * np.arange(count + 1)
        starts = np.clip(edges[None, :-1], start_s[:, None], None)
        ends = np.clip(edges[None, 1:], None, (start_s + took_s)[:, None])
        within = np.maximum(ends - starts, 0.0)
        took = within.sum(axis=0)
        cost = (within * (cost_s / took_s)[:, None]).sum(axis=0)
        used = took >= _LEAST_USE * window_s
        slowness = np.where(used, took / np.where(used, cost, 1.0), 1.0)
        return cls(
            slowness=slowness,
            clock_s=np.append(edges, edges[-1] + _FOREVER_S),
            work_s=np.cumsum(np.concatenate([[0.0], window_s / slowness, [_FOREVER_S]])),
        )

    def to_work(self, clock_s: FloatArray) -> FloatArray:
        """Not before the start."""
        return np.interp(clock_s, self.clock_s, self.work_s)

    def to_clock(self, work_s: FloatArray) -> FloatArray:
        """The reverse."""
        return np.interp(work_s, self.work_s, self.clock_s)


def predicted_at(pace: Pace, given: SimulationInput) -> Outcomes:
    """What the exact simulator says of a machine of this pace: it runs on the clock of the machine's work."""
    clock_s = given.arrivals.arrival_s
    work_s = pace.to_work(clock_s)
    on_work = replace(given, arrivals=replace(given.arrivals, arrival_s=work_s))
    outcomes = outcomes_of(on_work, simulate_exact(on_work))
    later_tokens = np.maximum(given.arrivals.output_tokens - 1, 1)
    first_s = pace.to_clock(work_s + outcomes.ttft_s)
    last_s = pace.to_clock(work_s + outcomes.ttft_s + outcomes.tpot_s * later_tokens)
    return replace(outcomes, at_s=clock_s, ttft_s=first_s - clock_s, tpot_s=(last_s - first_s) / later_tokens)
