"""What the simulator says of the requests that a replay sends: the same arrivals through a plan, as ``Outcomes``.

Called by the CLI and the measurements that hold simulation and reality against each other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from loraplex.core.errors import InvalidInput
from loraplex.core.plan import Plan
from loraplex.engine import EngineConfig
from loraplex.loadgen.outcomes import Outcomes
from loraplex.loadgen.schedule import PlannedRequest
from loraplex.simulator.types import (
    AdapterSize,
    CostKey,
    Outcome,
    ReplicaCost,
    SimulationInput,
    SimulationResult,
    Slo,
)
from loraplex.traces.arrivals import AdapterName, Arrivals


def replayed_arrivals(schedule: Sequence[PlannedRequest], plan: Plan) -> Arrivals:
    """The schedule with the names of the server: a target's model is a base of ``plan`` or an adapter.

    Not to be called with an empty schedule. InvalidInput naming an adapter that no group lists while the plan has
    several bases.
    """
    bases = tuple(dict.fromkeys(str(placed.base_model_id) for group in plan.groups for placed in group.bases))
    listed = {
        (share.tenant, share.name): str(placed.base_model_id)
        for group in plan.groups
        for placed in group.bases
        for share in placed.adapters
    }
    tenants = tuple(dict.fromkeys(request.target.tenant for request in schedule))
    adapters: dict[AdapterName, int] = {}
    adapter, base_model = [], []
    for request in schedule:
        tenant, model = request.target.tenant, request.target.model
        if model in bases:
            adapter.append(-1)
            base_model.append(bases.index(model))
            continue
        base = bases[0] if len(bases) == 1 else listed.get((tenant, model), listed.get((None, model)))
        if base is None:
            raise InvalidInput(f"adapter {tenant}/{model}: the plan has {len(bases)} bases and lists it on none")
        adapter.append(adapters.setdefault(AdapterName(tenant, base, model), len(adapters)))
        base_model.append(bases.index(base))
    return Arrivals(
        origin_s=0.0,
        arrival_s=np.array([request.at_s for request in schedule], dtype=np.float64),
        adapter=np.array(adapter, dtype=np.int32),
        base_model=np.array(base_model, dtype=np.int32),
        tenant=np.array([tenants.index(request.target.tenant) for request in schedule], dtype=np.int32),
        prompt_tokens=np.array([request.prompt_tokens for request in schedule], dtype=np.int32),
        output_tokens=np.array([request.output_tokens for request in schedule], dtype=np.int32),
        adapters=tuple(adapters),
        base_models=bases,
        tenants=tenants,
    )


def predict(
    schedule: Sequence[PlannedRequest],
    plan: Plan,
    *,
    costs: Mapping[CostKey, ReplicaCost],
    sizes: Callable[[Iterable[AdapterName]], tuple[AdapterSize, ...]],
    engine: EngineConfig,
    slo: Slo,
    simulator: Callable[[SimulationInput], SimulationResult],
    overhead_s: float = 0.0,
) -> Outcomes:
    """``simulator``: the exact or the fast one. ``overhead_s``: of each first token, what only the real system has
    (network, HTTP). In the order of ``schedule``. InvalidInput, BadConfig."""
    arrivals = replayed_arrivals(schedule, plan)
    given = SimulationInput(
        plan=plan,
        arrivals=arrivals,
        adapters=sizes(arrivals.adapters),
        costs=costs,
        slo=slo,
        engine=engine,
        overhead_s=overhead_s,
    )
    return outcomes_of(given, simulator(given))


def outcomes_of(given: SimulationInput, result: SimulationResult) -> Outcomes:
    """Of requests that all have a tenant."""
    served = result.outcome == Outcome.SERVED
    return Outcomes(
        at_s=given.arrivals.arrival_s,
        tenants=given.arrivals.tenants,
        tenant=given.arrivals.tenant,
        ttft_s=np.where(served, result.ttft_s, np.inf),
        tpot_s=np.where(served, result.tpot_s, np.inf),
    )
