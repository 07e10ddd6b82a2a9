"""An AlpaServe problem as arrays: what the compiled search works on.

Made from the values of ``simulator.alpaserve``; knows nothing of the search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from loraplex.core.errors import InvalidInput
from loraplex.simulator.alpaserve import OVERHEAD_S, Group, Indices, Layout, Mask, Profiles, StageSeconds, Work

Gibibytes = npt.NDArray[np.float64]
MEMORY_SLACK_GIB = 1e-9
"""Rounding of sums of weights."""


class Placement(NamedTuple):
    """What compiled code changes; ``to_groups`` makes it what the contract knows."""

    layout: Indices
    """[G] index of a layout, -1: unused; G = number of devices."""
    hosted: Mask
    """[G, M]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """M models, L layouts of S stages at most, R requests in order of arrival."""

    work: Work
    layouts: tuple[Layout, ...]
    """[L] by GPUs, then intra-operator degree."""
    num_gpus: Indices
    """[L]"""
    num_stages: Indices
    """[L]"""
    stage_s: StageSeconds
    """[L, M, S] float32 seconds by the contract."""
    weight_gib: Gibibytes
    """[L, M] of the fullest GPU; infinite where the model has no profile or would miss its SLO on an idle group."""
    num_devices: int
    memory_gib: float

    @classmethod
    def of(cls, work: Work, profiles: Profiles, *, num_devices: int, devices_per_node: int, memory_gib: float) -> Self:
        """Layouts are those of ``profiles`` that the devices allow: the shards of a stage on one node, a group within a
        node or of whole nodes. InvalidInput naming a model that fits nowhere."""
        layouts = sorted(
            {
                layout
                for model_type, layout in profiles
                if model_type in work.model_types and _fits_nodes(layout, num_devices, devices_per_node)
            },
            key=lambda layout: (layout.num_gpus, layout.op),
        )
        num_models = len(work.model_types)
        most = max((layout.pp for layout in layouts), default=1)
        stage_s = np.zeros((len(layouts), num_models, most), dtype=np.float32)
        weight = np.full((len(layouts), num_models), np.inf)
        loadable = np.zeros(num_models, dtype=np.bool_)
        for index, layout in enumerate(layouts):
            for model, model_type in enumerate(work.model_types):
                profile = profiles.get((model_type, layout))
                if profile is None or max(profile.weight_gib) > memory_gib:
                    continue
                loadable[model] = True
                stage_s[index, model, : layout.pp] = profile.seconds()
                if lone_latency_s(stage_s[index, model]) <= work.slo_s[model]:
                    weight[index, model] = max(profile.weight_gib)
        if not loadable.all():
            model = int(np.argmin(loadable))
            raise InvalidInput(
                f"models[{model}] ({work.model_types[model]}) fits no layout of {num_devices} GPUs with "
                f"{memory_gib:g} GiB each",
                param="models",
            )
        return cls(
            work=work,
            layouts=tuple(layouts),
            num_gpus=np.array([layout.num_gpus for layout in layouts], dtype=np.int32),
            num_stages=np.array([layout.pp for layout in layouts], dtype=np.int32),
            stage_s=stage_s,
            weight_gib=weight,
            num_devices=num_devices,
            memory_gib=memory_gib,
        )

    def on(self, work: Work) -> "Problem":
        """The same models and devices under other arrivals."""
        return Problem(
            work=work,
            layouts=self.layouts,
            num_gpus=self.num_gpus,
            num_stages=self.num_stages,
            stage_s=self.stage_s,
            weight_gib=self.weight_gib,
            num_devices=self.num_devices,
            memory_gib=self.memory_gib,
        )

    @property
    def num_models(self) -> int:
        return len(self.work.model_types)

    def is_feasible(self, groups: Sequence[Group]) -> bool:
        """Known layouts, no more GPUs than there are, weights within the budget on every GPU."""
        if sum(group.layout.num_gpus for group in groups) > self.num_devices:
            return False
        for group in groups:
            if group.layout not in self.layouts:
                return False
            weights = self.weight_gib[self.layouts.index(group.layout), list(group.models)]
            if weights.sum() > self.memory_gib + MEMORY_SLACK_GIB:
                return False
        return True


def to_groups(problem: Problem, placement: Placement) -> tuple[Group, ...]:
    """Sorted by their models, without empty groups."""
    groups = [
        Group(problem.layouts[index], tuple(int(model) for model in np.flatnonzero(placement.hosted[g])))
        for g, index in enumerate(placement.layout)
        if index >= 0 and placement.hosted[g].any()
    ]
    return tuple(sorted(groups, key=lambda group: group.models))


def from_groups(problem: Problem, groups: Sequence[Group]) -> Placement:
    """The reverse. ValueError for a layout that the problem does not know."""
    size = problem.num_devices
    placement = Placement(np.full(size, -1, dtype=np.int32), np.zeros((size, problem.num_models), dtype=np.bool_))
    for index, group in enumerate(groups):
        placement.layout[index] = problem.layouts.index(group.layout)
        placement.hosted[index, list(group.models)] = True
    return placement


def lone_latency_s(stage_s: StageSeconds) -> float:
    """Of one request on an idle group, overhead included."""
    return float(stage_s.astype(np.float64).sum()) + OVERHEAD_S


def _fits_nodes(layout: Layout, num_devices: int, devices_per_node: int) -> bool:
    size = layout.num_gpus
    if size > num_devices or layout.op > devices_per_node:
        return False
    if size <= devices_per_node:
        return devices_per_node % size == 0 or size == num_devices
    return size % devices_per_node == 0
