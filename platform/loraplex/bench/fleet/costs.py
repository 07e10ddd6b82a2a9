"""Costs of an experiment's bases on its devices, from the profiles; and the targets that follow. Pure.

Called by ``prepare`` and ``placements``.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from loraplex.bench.fleet.options import Experiment
from loraplex.bench.fleet.prepared import lone_requests
from loraplex.bench.fleet.traffic import Traffic
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import BasePlacement, GroupPlan, Plan
from loraplex.cost.profile import CostProfile
from loraplex.model_runner.build import load_model_spec
from loraplex.planner.capacity import capacities, demands
from loraplex.planner.problem import Node, Problem, kinds
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.types import AdapterSize, CostKey, ReplicaCost, SimulationInput, Slo
from loraplex.traces.arrivals import Arrivals

_NODE = "host"


def fleet_profile(experiment: Experiment) -> CostProfile:
    """All profiles in one, the bases under their names in the fleet. BadConfig naming what no profile knows, or the
    base whose model is another one than the profile's."""
    known = CostProfile.joined(CostProfile.load(name) for name in experiment.profiles)
    known.gpu(experiment.gpu)
    renamed = []
    for base in experiment.bases:
        name, base_id = base.profile or base.name, BaseModelId(base.name)
        profile = known if name == base.name else known.renamed(name, base_id)
        profiled, model = profile.base(base.name).model, load_model_spec(base.model, base_id)
        for field in ("num_layers", "hidden_size", "intermediate_size", "num_kv_heads", "vocab_size"):
            if getattr(profiled, field) != getattr(model, field):
                raise BadConfig(
                    f"base {base.name}: {base.model} is not of the size that the profiles have", param="bases"
                )
        renamed.append(profile)
    joined = CostProfile.joined(renamed)
    names = {base.name for base in experiment.bases}
    return CostProfile(
        gpus=tuple(gpu for gpu in joined.gpus if gpu.name == experiment.gpu),
        bases=tuple(base for base in joined.bases if base.name in names),
        steps=tuple(step for step in joined.steps if step.base in names and step.gpu == experiment.gpu),
    )


def fleet_costs(experiment: Experiment, profile: CostProfile) -> dict[CostKey, ReplicaCost]:
    """Of all shapes that the profiles know and the devices suffice for. BadConfig for a base without one."""
    engine, found = experiment.replica_engine, {}
    for base in experiment.bases:
        shapes = [s for s in profile.shapes(base.name, experiment.gpu) if s.num_ranks <= experiment.gpus]
        if not shapes:
            raise BadConfig(f"base {base.name}: no profile of it on at most {experiment.gpus} {experiment.gpu}")
        for shape in shapes:
            key = CostKey(gpu=experiment.gpu, base_model_id=BaseModelId(base.name), shape=shape)
            memory = profile.memory(
                base.name,
                experiment.gpu,
                shape,
                memory_fraction=experiment.memory_fraction,
                max_step_tokens=engine.max_step_tokens,
                max_rows=engine.max_running,
            )
            found[key] = dataclasses.replace(ReplicaCost.of(profile, key, engine), memory=memory)
    return found


def problem_of(
    experiment: Experiment,
    traffic: Traffic,
    costs: Mapping[CostKey, ReplicaCost],
    targets: Mapping[BaseModelId, Slo],
) -> Problem:
    """Of the window that is planned on."""
    return Problem(
        nodes=(Node(name=_NODE, gpu=experiment.gpu, num_gpus=experiment.gpus),),
        arrivals=traffic.planning,
        adapters=traffic.sizes,
        costs=costs,
        slo=Slo(),
        slo_of_base=targets,
        engine=experiment.replica_engine,
        turn_s=experiment.turn_s,
    )


def full_rate(problem: Problem) -> float:
    """Requests per second that the fleet serves within its targets, were devices and requests divisible: each base on
    groups of the kind that serves most of it per device."""
    demand = demands(problem)
    found = capacities(problem, kinds(problem), demand)
    rate = sum(one.requests_per_s for one in demand.values())
    needed = 0.0
    for base in problem.bases:
        best = max(one.requests_per_s / kind.shape.num_ranks for (kind, of), one in found.items() if of == base)
        needed += demand[base].requests_per_s / rate / best
    return problem.num_gpus / needed


def targets_of(
    experiment: Experiment, traffic: Traffic, costs: Mapping[CostKey, ReplicaCost]
) -> dict[BaseModelId, Slo]:
    """Of each base: as given, or ``slo_scale`` times what a lone request for it takes that has the median lengths."""
    found = {}
    for base in (BaseModelId(base.name) for base in experiment.bases):
        given = experiment.targets.get(base)
        if given is not None:
            found[base] = Slo(ttft_s=given.ttft_s, tpot_s=given.tpot_s)
            continue
        shape = min((key.shape for key in costs if key.base_model_id == base), key=lambda s: (s.num_ranks, s.pp))
        arrivals = traffic.measured
        own = arrivals.base_model == _index(arrivals.base_models, base)
        tokens = [
            max(2, int(np.median(tokens[own]))) if own.any() else 2
            for tokens in (arrivals.prompt_tokens, arrivals.output_tokens)
        ]
        group = GroupPlan(name="lone", shape=shape, gpu=experiment.gpu, bases=(BasePlacement(base_model_id=base),))
        lone = lone_requests((base,), count=1, gap_s=1.0, prompt_tokens=tokens[0], output_tokens=tokens[1])
        result = simulate_exact(simulation(experiment, Plan(version=1, groups=(group,)), lone, (), costs, {}))
        scale = experiment.slo_scale
        found[base] = Slo(ttft_s=scale * float(result.ttft_s[0]), tpot_s=scale * float(result.tpot_s[0]))
    return found


def simulation(
    experiment: Experiment,
    plan: Plan,
    arrivals: Arrivals,
    sizes: tuple[AdapterSize, ...],
    costs: Mapping[CostKey, ReplicaCost],
    targets: Mapping[BaseModelId, Slo],
) -> SimulationInput:
    return SimulationInput(
        plan=plan,
        arrivals=arrivals,
        adapters=sizes,
        costs=costs,
        slo=Slo(),
        slo_of_base=targets,
        engine=experiment.replica_engine,
        max_in_flight=experiment.steps_in_flight,
        turn_s=experiment.turn_s,
    )


def _index(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -2
