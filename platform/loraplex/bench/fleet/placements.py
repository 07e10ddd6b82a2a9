"""From the names of placements to plans: the planner's, baselines', one shape for all, or a file. Pure but for files.

Called by ``prepare``.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loraplex.bench.fleet.options import PLANNER, Experiment
from loraplex.bench.fleet.prepared import groups_line
from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.core.plan_check import check_form
from loraplex.planner.baselines import Baseline, baselines
from loraplex.planner.problem import Problem
from loraplex.planner.search import Search

_SHAPE = re.compile(r"(\d+)x(\d+)( apart)?")
_BEST = re.compile(r"best (\d+) baselines?")
_FEWEST = re.compile(r"fewest for (\d+(?:\.\d+)?)%")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    name: str
    setting: str
    """What the name leaves open: a baseline's best of its grid, the planner's groups."""
    plan: Plan


def placements(experiment: Experiment, problem: Problem, *, attained: Callable[[Plan], float]) -> tuple[Placement, ...]:
    """In the order of ``experiment.placements``; a baseline that has no layout here is left out. ``attained``: of a
    plan, on what will be measured; ``best N baselines`` are the best of the others by it.

    BadConfig for an unknown name or a file that is no plan; errors of the planner.
    """
    compared: tuple[Baseline, ...] | None = None
    found: list[Placement] = []

    def known() -> tuple[Baseline, ...]:
        nonlocal compared
        compared = baselines(problem, seed=experiment.seed) if compared is None else compared
        return compared

    for name in experiment.placements:
        if name == PLANNER:
            found.append(_planned(experiment, problem, name))
        elif fewest := _FEWEST.fullmatch(name):
            found += _fewest(experiment, problem, float(fewest[1]) / 100, attained)
        elif shape := _SHAPE.fullmatch(name):
            found.append(Placement(name=name, setting="", plan=_of_shape(experiment, shape)))
        elif Path(name).suffix in (".json", ".yaml", ".yml"):
            found.append(Placement(name=name, setting="", plan=_of_file(experiment, Path(name))))
        elif best := _BEST.fullmatch(name):
            given = {one.name for one in found} | set(experiment.placements)
            others = sorted((one for one in known() if one.name not in given), key=lambda one: -attained(one.plan))
            found += [_of_baseline(one) for one in others[: int(best[1])]]
        else:
            found += [_of_baseline(one) for one in _named(name, known())]
    return tuple(found)


def _planned(experiment: Experiment, problem: Problem, name: str) -> Placement:
    plan = Search(problem, evaluations=experiment.evaluations, seed=experiment.seed).run().plan
    return Placement(name=name, setting=groups_line(plan), plan=plan)


def _fewest(
    experiment: Experiment, problem: Problem, wanted: float, attained: Callable[[Plan], float]
) -> list[Placement]:
    """The planner's plans for one device, two, ..., up to the first that attains ``wanted``: this one, and the one
    before it. BadConfig when not even all devices do; InvalidInput when the planner finds no plan at all."""
    (node,) = problem.nodes
    last: list[Placement] = []
    for count in range(1, experiment.gpus + 1):
        fewer = problem.changed(nodes=(dataclasses.replace(node, num_gpus=count),))
        try:
            last.append(_planned(experiment, fewer, f"planner on {count} of {experiment.gpus}"))
        except InvalidInput:
            if count == experiment.gpus:
                raise
            continue  # a base fits on so few in no shape
        if attained(last[-1].plan) >= wanted:
            return last[-2:]
    shares = ", ".join(f"{attained(one.plan):.3f} by {one.name}" for one in last)
    raise BadConfig(f"no plan for {experiment.gpus} devices attains {wanted:g} ({shares})", param="placements")


def _named(name: str, known: Sequence[Baseline]) -> list[Baseline]:
    found = [one for one in known if one.name == name]
    if not found:
        names = ", ".join(one.name for one in known)
        raise BadConfig(
            f"placement {name!r}: not {PLANNER!r}, a shape such as '2x1' or '1x1 apart', 'best N baselines', "
            f"'fewest for 99%', a plan's file, or a baseline that has a layout here ({names})",
            param="placements",
        )
    return found


def _of_baseline(baseline: Baseline) -> Placement:
    return Placement(name=baseline.name, setting=baseline.setting, plan=baseline.plan)


def _of_shape(experiment: Experiment, match: re.Match[str]) -> Plan:
    shape = Shape(tp=int(match[1]), pp=int(match[2]))
    count = experiment.gpus // shape.num_ranks if shape.num_ranks else 0
    bases = [BasePlacement(base_model_id=BaseModelId(base.name)) for base in experiment.bases]
    apart = match[3] is not None
    if count < (len(bases) if apart else 1):
        raise BadConfig(f"placement {match[0]!r} needs more than {experiment.gpus} devices", param="placements")
    groups = tuple(
        GroupPlan(
            name=f"g{index}",
            shape=shape,
            gpu=experiment.gpu,
            bases=(bases[index % len(bases)],) if apart else tuple(bases),
        )
        for index in range(count)
    )
    return Plan(version=1, groups=groups)


def _of_file(experiment: Experiment, path: Path) -> Plan:
    try:
        plan = msgspec.yaml.decode(path.read_bytes(), type=Plan)
        check_form(plan)
    except (OSError, msgspec.DecodeError) as error:
        raise BadConfig(f"{path}: not a plan: {error}", param="placements") from error
    except InvalidInput as error:
        raise BadConfig(f"{path}: {error.message}", param="placements") from error
    wanted = sum(group.shape.num_ranks for group in plan.groups)
    if wanted > experiment.gpus:
        raise BadConfig(f"{path}: its groups take {wanted} devices of {experiment.gpus}", param="placements")
    groups = tuple(dataclasses.replace(group, gpu=experiment.gpu, nodes=()) for group in plan.groups)
    return dataclasses.replace(plan, groups=groups)
