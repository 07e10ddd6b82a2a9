"""The same question under other circumstances: more GPUs, another rate, burstiness or SLO (AlpaServe's curves).

Each point is planned anew with a small budget, the baselines too where they are wanted. Called by the command
``whatif``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.planner.baselines import baselines
from loraplex.planner.problem import Node, Problem
from loraplex.planner.search import Search
from loraplex.simulator.types import Slo
from loraplex.traces.arrivals import Arrivals


class Knob(StrEnum):
    GPUS = "gpus"
    """Of all nodes, as a factor."""
    RATE = "rate"
    """Of requests, as a factor."""
    CV = "cv"
    """Of the gaps between an adapter's requests: Gamma gaps of the same mean rate."""
    SLO = "slo"
    """Both targets, as a factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    knob: Knob
    value: float
    num_gpus: int
    attainment: dict[str, float]
    """By policy; ``loraplex`` is the plan."""


def curve(
    problem: Problem,
    knob: Knob,
    values: Sequence[float],
    *,
    evaluations: int = 100,
    seed: int = 0,
    with_baselines: bool = True,
    progress: Callable[[Point], None] = lambda point: None,
) -> tuple[Point, ...]:
    """A point for each value. BadConfig for a value that is not a number above 0; InvalidInput naming the value for
    which nothing can be planned, and why."""
    wrong = [value for value in values if not (np.isfinite(value) and value > 0)]
    if wrong or not values:
        raise BadConfig(f"{knob.value}: {wrong[0] if wrong else 'nothing'} is not a number above 0", param=knob.value)
    points = []
    for value in values:
        try:
            changed = vary(problem, knob, value, seed=seed)
            found = Search(changed, evaluations=evaluations, seed=seed).run()
        except InvalidInput as error:
            raise InvalidInput(f"{knob.value} {value:g}: {error.message}", param=error.param) from error
        attainment = {"loraplex": found.attainment}
        if with_baselines:
            attainment |= {baseline.name: baseline.attainment for baseline in baselines(changed, seed=seed)}
        points.append(Point(knob=knob, value=value, num_gpus=changed.num_gpus, attainment=attainment))
        progress(points[-1])
    return tuple(points)


def vary(problem: Problem, knob: Knob, value: float, *, seed: int = 0) -> Problem:
    """The problem with one thing changed."""
    if knob is Knob.SLO:
        slo = {base: _scaled(one, value) for base, one in problem.slo_of_base.items()}
        return problem.changed(slo=_scaled(problem.slo, value), slo_of_base=slo)
    if knob is Knob.GPUS:
        return problem.changed(nodes=_nodes(problem.nodes, value))
    if knob is Knob.RATE:
        arrivals = problem.arrivals
        return problem.changed(arrivals=replace(arrivals, arrival_s=arrivals.arrival_s / value))
    return problem.changed(arrivals=_with_cv(problem.arrivals, value, seed))


def _scaled(slo: Slo, factor: float) -> Slo:
    return Slo(ttft_s=slo.ttft_s * factor, tpot_s=slo.tpot_s * factor)


def _nodes(nodes: tuple[Node, ...], factor: float) -> tuple[Node, ...]:
    """Whole nodes as far as possible, the last one smaller."""
    left = max(1, round(sum(node.num_gpus for node in nodes) * factor))
    made: list[Node] = []
    for number in range(left):
        like = nodes[number % len(nodes)]
        size = min(like.num_gpus, left)
        if not size:
            break
        made.append(Node(name=f"{like.name}-{number}", gpu=like.gpu, num_gpus=size))
        left -= size
    return tuple(made)


def _with_cv(arrivals: Arrivals, cv: float, seed: int) -> Arrivals:
    """New times; which requests an adapter (or the bare base) has, and their order, stay."""
    random = np.random.default_rng(seed)
    start_s, end_s = float(arrivals.arrival_s[0]), float(arrivals.arrival_s[-1])
    times_s = arrivals.arrival_s.copy()
    for adapter in np.unique(arrivals.adapter):
        rows = np.flatnonzero(arrivals.adapter == adapter)
        gaps = random.gamma(1 / cv**2, cv**2, size=len(rows) + 1)
        times_s[rows] = start_s + np.cumsum(gaps)[:-1] / gaps.sum() * (end_s - start_s)
    order = np.argsort(times_s, kind="stable")
    return replace(
        arrivals,
        arrival_s=times_s[order],
        adapter=arrivals.adapter[order],
        base_model=arrivals.base_model[order],
        tenant=arrivals.tenant[order],
        prompt_tokens=arrivals.prompt_tokens[order],
        output_tokens=arrivals.output_tokens[order],
    )
