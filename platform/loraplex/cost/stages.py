"""Where to cut a model's layers into pipeline stages, so that the slowest stage is as fast as can be. Pure.

Called by ``model_runner`` when a group starts, by the cost model for what its stages take and hold, and by ``loraplex
profile``, which prints the cut beside the equal one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import inf
from operator import add

from loraplex.core.errors import BadConfig
from loraplex.core.model import ModelSpec


def cut_stages(
    layer_costs: Sequence[float], num_stages: int, *, first_cost: float = 0.0, last_cost: float = 0.0
) -> tuple[int, ...]:
    """Layers of each stage, at least one. ``layer_costs``: of each layer, in any unit; ``first_cost``, ``last_cost``:
    what the first and the last stage do besides (embedding; head and sampling). Of the cuts whose slowest stage is
    fastest the most even one (least squares), and of these the one whose earlier stages hold more. BadConfig when there
    are fewer layers than stages.

    A dynamic programme over (stages, layers), twice: for the slowest stage, then for the squares within that bound.
    """
    num_layers = len(layer_costs)
    if not 1 <= num_stages <= num_layers:
        raise BadConfig(f"{num_layers} layers cannot be cut into {num_stages} stages", param="pp")
    sums = [0.0, *accumulate(layer_costs)]

    def stage_cost(stage: int, start: int, end: int) -> float:
        cost = sums[end] - sums[start]
        return cost + (first_cost if stage == 0 else 0.0) + (last_cost if stage == num_stages - 1 else 0.0)

    slowest, _ = _best_cut(num_layers, num_stages, stage_cost, max)

    def squares(stage: int, start: int, end: int) -> float:
        cost = stage_cost(stage, start, end)
        return cost * cost if cost <= slowest else inf

    return _best_cut(num_layers, num_stages, squares, add)[1]


def _best_cut(
    num_layers: int,
    num_stages: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """The least ``join`` of the stages' costs, and a cut that has it. ``cost(stage, start, end)``: layers [start, end);
    the best of the first s stages over the first n layers is the least over the start of the last of them."""
    best = [inf, *(cost(0, 0, end) for end in range(1, num_layers + 1))]
    starts: list[list[int]] = []
    for stage in range(1, num_stages):
        found, where = [inf] * (num_layers + 1), [0] * (num_layers + 1)
        for end in range(stage + 1, num_layers + 1):
            for start in range(stage, end):
                value = join(best[start], cost(stage, start, end))
                if value <= found[end]:
                    found[end], where[end] = value, start
        best = found
        starts.append(where)
    cut, end = [], num_layers
    for where in reversed(starts):
        cut.append(end - where[end])
        end = where[end]
    return best[num_layers], (*reversed((*cut, end)),)


def equal_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """As many layers in each stage as in any other, or one more."""
    size, larger = divmod(num_layers, num_stages)
    return tuple(size + (stage < larger) for stage in range(num_stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Of one kind of step, in any unit."""

    layers: tuple[float, ...]
    first: float = 0.0
    """What the first stage does besides."""
    last: float = 0.0
    """What the last stage does besides: the head."""

    def cut(self, num_stages: int) -> tuple[int, ...]:
        """As ``cut_stages``."""
        return cut_stages(self.layers, num_stages, first_cost=self.first, last_cost=self.last)

    def slowest(self, stage_layers: Sequence[int]) -> float:
        """Cost of the slowest stage of a cut: the pace of a full pipeline."""
        costs, start = [], 0
        for count in stage_layers:
            costs.append(sum(self.layers[start : start + count]))
            start += count
        costs[0] += self.first
        costs[-1] += self.last
        return max(costs)


def weight_costs(model: ModelSpec) -> LayerCosts:
    """Of decode steps of few rows, whose time is that of reading the weights: elements of a layer against the head's.
    Of the embedding a step reads its own rows alone."""
    d = model.hidden_size
    layer = 2 * d * (model.q_size + model.kv_size) + 3 * d * model.intermediate_size
    return LayerCosts(layers=(float(layer),) * model.num_layers, last=float(model.vocab_size * d))


@cache
def stage_layers(model: ModelSpec, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, as groups are cut unless they are told otherwise. BadConfig when there are too few."""
    return weight_costs(model).cut(num_stages)
