"""Makes a prepared experiment: arrivals, targets, plans, and what the exact simulator says of each. No accelerator.

Called by ``__main__`` and the command ``bench fleet``.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from loraplex.bench.fleet.costs import (
    fleet_costs,
    fleet_profile,
    full_rate,
    problem_of,
    simulation,
    targets_of,
)
from loraplex.bench.fleet.options import Experiment, FunctionsLoad, Load, SyntheticLoad, Target
from loraplex.bench.fleet.placements import Placement, placements
from loraplex.bench.fleet.prepared import (
    LONE_TOKENS,
    Cell,
    Predicted,
    PreparedFleet,
    Seconds,
    Workload,
    groups_line,
    lone_requests,
)
from loraplex.bench.fleet.traffic import Traffic, make_traffic
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.loadgen.outcomes import Mask
from loraplex.simulator.cluster import Cluster
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.types import CostKey, FloatArray, Outcome, ReplicaCost, SimulationInput, Slo
from loraplex.simulator.workload import Workload as SimulatedWorkload
from loraplex.traces.arrivals import Arrivals

_PRIMES_PER_S = 50.0
_PRIME_TOKENS = (32, 2)
"""Prompt and output tokens of the request of each adapter before the warm-up."""
_SETTLE_S = 1.0
"""Between the last of these and the warm-up."""
_LONE_GAP_S = 10.0
_LOAD_ROUNDS = 5

Costs = Mapping[CostKey, ReplicaCost]


def prepare(experiment: Experiment, *, say: Callable[[str], None]) -> PreparedFleet:
    """BadConfig, InvalidInput and others as the parts raise them; each names the load."""
    profile = fleet_profile(experiment)
    costs = fleet_costs(experiment, profile)
    targets: dict[BaseModelId, Slo] = {}
    workloads: dict[str, Workload] = {}
    cells: list[Cell] = []
    for name, load in experiment.loads.items():
        traffic = make_traffic(experiment, load)
        # All loads are judged by the same targets.
        targets = targets or targets_of(experiment, traffic, costs)
        traffic = _at_load(experiment, load, traffic, costs, targets)
        measured, counts_from_s = _primed(traffic)
        counted = measured.arrival_s >= counts_from_s + experiment.warm_s
        workload = Workload.of(
            measured,
            traffic.sizes,
            counts_from_s=counts_from_s + experiment.warm_s,
            load=_words(load, int(np.count_nonzero(counted)), experiment.seconds),
        )
        workloads[name] = workload
        say(f"{name}: {workload.load}")
        cells += _cells(experiment, name, workload, traffic, costs, targets, say=say)
    return PreparedFleet(
        experiment=experiment,
        targets={base: Target(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s) for base, slo in targets.items()},
        profile=profile,
        workloads=workloads,
        cells=cells,
    )


def _at_load(
    experiment: Experiment, load: Load, traffic: Traffic, costs: Costs, targets: Mapping[BaseModelId, Slo]
) -> Traffic:
    """The load's share of the full rate, in the window that is measured."""
    if not isinstance(load, SyntheticLoad | FunctionsLoad) or load.load is None:
        return traffic
    factor = 1.0
    for _ in range(_LOAD_ROUNDS):
        # Requests are whole and other ones each time: the rate follows the factor not quite, nor do their lengths stay.
        problem = problem_of(experiment, traffic, costs, targets)
        wanted = load.load * full_rate(problem.changed(arrivals=traffic.measured))
        factor *= wanted * experiment.measured_s / len(traffic.measured)
        traffic = make_traffic(experiment, load, factor=factor)
    return traffic


def _primed(traffic: Traffic) -> tuple[Arrivals, float]:
    """A short request of every adapter before the window, so that both sides begin with them on the devices; and when
    the window begins."""
    arrivals = traffic.measured
    count = len(arrivals.adapters)
    if not count:
        return arrivals, 0.0
    begins_s = count / _PRIMES_PER_S + _SETTLE_S
    bases = [arrivals.base_models.index(name.base_model or "") for name in arrivals.adapters]
    tenants = [arrivals.tenants.index(name.tenant or "") for name in arrivals.adapters]

    def before(first: object, values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.array(first, dtype=values.dtype), values])

    primed = dataclasses.replace(
        arrivals,
        arrival_s=before(np.arange(count) / _PRIMES_PER_S, arrivals.arrival_s + begins_s),
        adapter=before(range(count), arrivals.adapter),
        base_model=before(bases, arrivals.base_model),
        tenant=before(tenants, arrivals.tenant),
        prompt_tokens=before([_PRIME_TOKENS[0]] * count, arrivals.prompt_tokens),
        output_tokens=before([_PRIME_TOKENS[1]] * count, arrivals.output_tokens),
    )
    return primed, begins_s


def _cells(
    experiment: Experiment,
    name: str,
    workload: Workload,
    traffic: Traffic,
    costs: Costs,
    targets: Mapping[BaseModelId, Slo],
    *,
    say: Callable[[str], None],
) -> list[Cell]:
    """One for each plan that is another."""
    arrivals, sizes = workload.arrivals, workload.sizes
    counted = arrivals.arrival_s >= workload.counts_from_s
    runs: dict[Plan, tuple[SimulationInput, Predicted, Mask]] = {}

    def attained(plan: Plan) -> float:
        plan = _plain(plan)
        if plan not in runs:
            given = simulation(experiment, plan, arrivals, sizes, costs, targets)
            result = simulate_exact(given)
            served = result.outcome == Outcome.SERVED
            predicted = Predicted(ttft_s=_seconds(result.ttft_s, served), tpot_s=_seconds(result.tpot_s, served))
            runs[plan] = given, predicted, result.good
        return float(np.mean(runs[plan][2][counted]))

    problem = problem_of(experiment, traffic, costs, targets)
    by_plan: dict[Plan, list[Placement]] = {}
    for placement in placements(experiment, problem, attained=attained):
        by_plan.setdefault(_plain(placement.plan), []).append(placement)
    cells = []
    for plan, members in by_plan.items():
        say(f"{name}: {', '.join(one.name for one in members)} ({groups_line(plan)}): {attained(plan):.3f} predicted")
        given, predicted, _ = runs[plan]
        cells.append(
            Cell(
                workload=name,
                placements=tuple(one.name for one in members),
                settings=tuple(one.setting for one in members),
                plan=plan,
                pages=_pages(given),
                predicted=predicted,
                lone_ttft_s=_lone(experiment, plan, costs),
            )
        )
    return cells


def _plain(plan: Plan) -> Plan:
    """Without what makes no difference here: names, nodes, version, the order of groups, adapters of a base that one
    group alone serves."""
    hosts = Counter(placed.base_model_id for group in plan.groups for placed in group.bases)
    groups = sorted(plan.groups, key=lambda g: (-g.shape.num_ranks, g.shape.pp, [b.base_model_id for b in g.bases]))
    return Plan(
        version=1,
        groups=tuple(
            dataclasses.replace(
                group,
                name=f"g{index}",
                nodes=(),
                bases=tuple(
                    dataclasses.replace(placed, adapters=()) if hosts[placed.base_model_id] == 1 else placed
                    for placed in group.bases
                ),
            )
            for index, group in enumerate(groups)
        ),
    )


def _pages(given: SimulationInput) -> list[list[int]]:
    replicas = iter(Cluster.of(given, SimulatedWorkload.of(given.arrivals, given.adapters)).replicas)
    return [[next(replicas).num_pages for _ in group.bases] for group in given.plan.groups]


def _lone(experiment: Experiment, plan: Plan, costs: Costs) -> dict[str, float]:
    bases = tuple(dict.fromkeys(placed.base_model_id for group in plan.groups for placed in group.bases))
    prompt, output = LONE_TOKENS
    arrivals = lone_requests(bases, count=1, gap_s=_LONE_GAP_S, prompt_tokens=prompt, output_tokens=output)
    result = simulate_exact(simulation(experiment, plan, arrivals, (), costs, {}))
    return {base: float(result.ttft_s[index]) for index, base in enumerate(bases)}


def _seconds(values: FloatArray, served: np.ndarray) -> Seconds:
    return [round(value, 6) if there else None for value, there in zip(values.tolist(), served.tolist(), strict=True)]


def _words(load: Load, requests: int, seconds: float) -> str:
    share = getattr(load, "load", None)
    cv = getattr(load, "cv", None)
    words = f"{requests / seconds:.2f} requests/s"
    if share is not None:
        words += f", {share:.0%} of the full rate"
    return words + (f", CV {cv:g}" if cv is not None else "")
