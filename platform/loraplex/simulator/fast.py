"""The cluster as a compiled event simulation: what ``exact`` simulates, some hundred thousand requests a second.

Between two events of a replica (a prompt, a first or last token, pages that run out) its steps are summed, not run one
by one. How near it comes to ``exact`` is what ``loraplex.simulator.compare`` prints. Called by ``planner`` and ``cli``.
"""

import numpy as np

from loraplex.core.errors import InvalidInput
from loraplex.simulator.cluster import Cluster
from loraplex.simulator.compiled import compiled, inner
from loraplex.simulator.fast_router import arrive, pump, refuse_all
from loraplex.simulator.fast_state import Knobs, State, knobs_of, state_of
from loraplex.simulator.fast_steps import wake
from loraplex.simulator.results import Happened, result_of
from loraplex.simulator.types import Outcome, Serving, SimulationInput, SimulationResult
from loraplex.simulator.unbatched import simulate_unbatched
from loraplex.simulator.workload import Workload


def simulate(given: SimulationInput, workload: Workload | None = None) -> SimulationResult:
    """Runs the whole trace, to the last token; releases the GIL meanwhile. ``workload``: of ``given.arrivals``, to save
    making it again.

    InvalidInput as ``Workload.of`` and ``Cluster.of``, and for another policy than the router's own.
    """
    if given.router.policy != "predicted-finish":
        raise InvalidInput(f"policy {given.router.policy} runs in the exact simulator alone", param="policy")
    workload = workload or Workload.of(given.arrivals, given.adapters)
    cluster = Cluster.of(given, workload)
    if given.serving is Serving.UNBATCHED:
        return result_of(given, workload, cluster, simulate_unbatched(given, workload, cluster))
    knobs = knobs_of(given, cluster)
    state = state_of(given, workload, cluster, knobs)
    run(state, knobs)
    return result_of(given, workload, cluster, _happened(state, cluster))


@compiled
def run(state: State, knobs: Knobs) -> None:
    """From the first arrival until nothing happens any more."""
    _run(state, knobs)


@inner
def _run(state: State, knobs: Knobs) -> None:
    row, count = 0, len(state.requests)
    while True:
        p = 0
        for index in range(1, len(state.wake_s)):
            if state.wake_s[index] < state.wake_s[p]:
                p = index
        wake_s = state.wake_s[p]
        if row < count and state.requests[row].arrival_s <= wake_s:
            arrive(state, knobs, row, state.requests[row].arrival_s)
            row += 1
        elif wake_s < np.inf:
            wake(state, knobs, p)
            if state.queue_size[state.replicas[p].base] > 0:
                pump(state, knobs, p, wake_s)
        else:
            break
    refuse_all(state)


def _happened(state: State, cluster: Cluster) -> Happened:
    requests, replicas = state.requests, state.replicas
    served = requests["outcome"] == Outcome.SERVED
    page_bytes = np.array([replica.cost.memory.page_bytes for replica in cluster.replicas], dtype=np.float64)
    return Happened(
        first_s=requests["first_s"].copy(),
        end_s=requests["end_s"].copy(),
        num_output=np.where(served, requests["output"], 0).astype(np.int32),
        outcome=requests["outcome"].astype(np.int8),
        replica=requests["replica"].copy(),
        busy_s=replicas["busy_s"].copy(),
        num_steps=replicas["num_steps"].copy(),
        num_preemptions=replicas["num_preemptions"].copy(),
        num_loads=replicas["num_loads"].copy(),
        load_bytes=replicas["num_loaded_pages"] * page_bytes,
    )
