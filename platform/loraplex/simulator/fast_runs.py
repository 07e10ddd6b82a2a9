"""Runs of steps of the fast simulator, whose times are an arithmetic series. Compiled; called by ``fast_steps`` and
``fast_turns``.
"""

import numpy as np

from loraplex.simulator.compiled import inlined, inner
from loraplex.simulator.fast_state import State


@inlined
def run_s(first_s: float, slope_s: float, count: int) -> float:
    """Seconds of ``count`` steps of which the first takes ``first_s`` and each later one ``slope_s`` more."""
    return count * first_s + slope_s * (0.5 * count * (count - 1))


@inner
def steps_until(state: State, p: int, at_s: float) -> int:
    """Steps of the run of a replica up to that in which ``at_s`` lies, that one included; 1 at least."""
    replica = state.replicas[p]
    passed_s, first_s, slope_s = at_s - replica.run_start_s, replica.run_step_s, replica.run_slope_s
    count = passed_s / first_s
    if slope_s > 0.0:
        half = first_s - 0.5 * slope_s
        count = (np.sqrt(half * half + 2.0 * slope_s * max(passed_s, 0.0)) - half) / slope_s
    steps = min(max(1, int(np.ceil(count))), replica.run_count)
    while steps > 1 and run_s(first_s, slope_s, steps - 1) >= passed_s:
        steps -= 1
    while steps < replica.run_count and run_s(first_s, slope_s, steps) < passed_s:
        steps += 1
    return int(steps)
