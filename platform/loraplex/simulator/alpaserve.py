"""AlpaServe's simulator by its contract (Li et al., OSDI 2023, section 6; rules as stated with its recorded cases).

Batch size 1. A request goes to the group hosting its model whose last stage is free first (the first group on ties) and
walks the stages, each of ``profile x (1 + 0.009 x stages)`` seconds in float32. It is accepted if it ends, with 11 ms
on top, within its SLO; otherwise it is dropped without effect. Knows no files; called by ``alpaserve_cases`` and, with
its own arrays, by the planner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loraplex.core.errors import InvalidInput
from loraplex.simulator.compiled import compiled

STAGE_PENALTY = 0.009
"""Share by which each stage of a pipeline slows every stage of it."""
OVERHEAD_S = 0.011
MARGIN_S = 10.0
"""Requests of about so many seconds at either end do not count."""

Seconds = npt.NDArray[np.float64]
StageSeconds = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Layout(NamedTuple):
    """How a group of ``dp * op * pp`` GPUs is cut: ``op`` ways within an operator, into ``pp`` stages."""

    dp: int
    op: int
    pp: int

    @property
    def num_gpus(self) -> int:
        return self.dp * self.op * self.pp


class Group(NamedTuple):
    layout: Layout
    models: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProfile:
    """One model type in one layout, at batch size 1."""

    latency_s: tuple[float, ...]
    """[pp], as profiled."""
    weight_gib: tuple[float, ...]
    """[pp] of one GPU."""

    def seconds(self) -> StageSeconds:
        """[pp] as the contract has it."""
        return np.array([s * (1 + STAGE_PENALTY * len(self.latency_s)) for s in self.latency_s], dtype=np.float32)


Profiles = Mapping[tuple[str, Layout], StageProfile]
"""By (model type, layout)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is asked of a cluster: M models, R requests in order of arrival."""

    model_types: tuple[str, ...]
    """[M]"""
    slo_s: Seconds
    """[M]"""
    arrival_s: Seconds
    """[R]"""
    model: Indices
    """[R] index of a model."""

    def scored(self) -> slice:
        """The requests that count: s = int(10 / span * R) are left out at either end."""
        count = len(self.arrival_s)
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        margin = int(MARGIN_S / span_s * count) if span_s > 0 else 0
        return slice(margin, count - margin)

    def between(self, start_s: float, end_s: float) -> "Work":
        """The requests that arrive in [start, end)."""
        first, last = np.searchsorted(self.arrival_s, (start_s, end_s), side="left")
        return Work(
            model_types=self.model_types,
            slo_s=self.slo_s,
            arrival_s=self.arrival_s[first:last],
            model=self.model[first:last],
        )


def simulate(work: Work, groups: Sequence[Group], profiles: Profiles) -> Mask:
    """[R] whether each request is accepted; all groups idle at the start.

    The order of ``groups`` decides between those that are free at the same time (AlpaServe itself sorts most of its
    placements by their models, and those of its ILP not).
    InvalidInput when a group's layout has no profile of one of its models.
    """
    num_models = len(work.model_types)
    stages = max((group.layout.pp for group in groups), default=1)
    stage_s = np.zeros((len(groups), num_models, stages), dtype=np.float32)
    hosting: list[list[int]] = [[] for _ in range(num_models)]
    for index, group in enumerate(groups):
        for model in dict.fromkeys(group.models):
            profile = _profile(profiles, work, model, group.layout)
            stage_s[index, model, : group.layout.pp] = profile.seconds()
            hosting[model].append(index)
    accepted = np.zeros(len(work.arrival_s), dtype=np.bool_)
    serve(
        work.arrival_s,
        work.model,
        work.slo_s,
        np.cumsum([0, *map(len, hosting)], dtype=np.int32),
        np.array([group for groups_of in hosting for group in groups_of], dtype=np.int32),
        np.array([group.layout.pp for group in groups], dtype=np.int32),
        stage_s,
        accepted,
    )
    return accepted


def simulate_schedule(
    work: Work, start_s: Sequence[float], placements: Sequence[Sequence[Group]], profiles: Profiles
) -> Mask:
    """As ``simulate``, with ``placements[k]`` from ``start_s[k]`` on. At a change all groups start idle: what runs then
    is not part of the contract. What arrives before the first change is served by the first placement."""
    starts = [-np.inf, *start_s[1:], np.inf]
    parts = [
        simulate(work.between(start, end), groups, profiles)
        for start, end, groups in zip(starts, starts[1:], placements, strict=False)
    ]
    return np.concatenate(parts)


def goodput(work: Work, accepted: Mask) -> float:
    """Accepted share of the scored requests; 0 when none count."""
    scored = accepted[work.scored()]
    return float(np.count_nonzero(scored) / len(scored)) if len(scored) else 0.0


def memory_gib(work: Work, group: Group, profiles: Profiles) -> float:
    """Weights on the fullest GPU, by the contract: the sum over the models of each one's largest stage."""
    return sum(max(_profile(profiles, work, model, group.layout).weight_gib) for model in group.models)


def _profile(profiles: Profiles, work: Work, model: int, layout: Layout) -> StageProfile:
    profile = profiles.get((work.model_types[model], layout))
    if profile is None:
        raise InvalidInput(
            f"no profile of {work.model_types[model]} with dp {layout.dp}, op {layout.op}, pp {layout.pp}",
            param="placement",
        )
    return profile


@compiled
def dispatch(
    now_s: float,
    model: int,
    slo_s: float,
    overhead_s: float,
    first_host: Indices,
    hosts: Indices,
    num_stages: Indices,
    stage_s: StageSeconds,
    clocks: Seconds,
    ends: Seconds,
) -> tuple[int, float]:
    """One request: (group or -1, when its last stage ends). Moves ``clocks`` [G, most stages], when each stage of a
    group is free, if it is accepted; ``ends`` [most stages] is scratch. The rest as for ``serve``."""
    best = -1
    for position in range(first_host[model], first_host[model + 1]):
        group = hosts[position]
        if best < 0 or clocks[group, num_stages[group] - 1] < clocks[best, num_stages[best] - 1]:
            best = group
    if best < 0:
        return -1, np.inf
    t = now_s
    for stage in range(num_stages[best]):
        t = max(t, clocks[best, stage]) + np.float64(stage_s[best, model, stage])
        ends[stage] = t
    if not t + overhead_s - now_s <= slo_s:
        return -1, np.inf
    for stage in range(num_stages[best]):
        clocks[best, stage] = ends[stage]
    return best, t


@compiled
def serve(
    arrival_s: Seconds,
    model: Indices,
    slo_s: Seconds,
    first_host: Indices,
    hosts: Indices,
    num_stages: Indices,
    stage_s: StageSeconds,
    accepted: Mask,
) -> int:
    """The contract itself, R requests over G groups; the number of accepted ones. Writes ``accepted`` [R].

    ``hosts[first_host[m] : first_host[m + 1]]``: groups of model m, ascending. ``num_stages`` [G]; ``stage_s``
    [G, M, most stages] float32.
    """
    clocks = np.zeros((len(num_stages), stage_s.shape[2]), dtype=np.float64)
    return serve_from(clocks, arrival_s, model, slo_s, first_host, hosts, num_stages, stage_s, accepted)


@compiled
def serve_from(
    clocks: Seconds,
    arrival_s: Seconds,
    model: Indices,
    slo_s: Seconds,
    first_host: Indices,
    hosts: Indices,
    num_stages: Indices,
    stage_s: StageSeconds,
    accepted: Mask,
) -> int:
    """As ``serve``, of groups whose stages are free at ``clocks`` [G, most stages], which it moves on."""
    ends = np.empty(stage_s.shape[2], dtype=np.float64)
    count = 0
    for request in range(len(arrival_s)):
        m = model[request]
        group, _ = dispatch(
            arrival_s[request], m, slo_s[m], OVERHEAD_S, first_host, hosts, num_stages, stage_s, clocks, ends
        )
        accepted[request] = group >= 0
        count += group >= 0
    return count
