"""How long one planned step takes on a group, by the cost model.

The same for the exact simulator's replicas and for the paced executor of ``testing``. Pure.
"""

import numpy as np

from loraplex.core.plan import Shape
from loraplex.core.step import StepPlan
from loraplex.cost.step_cost import StepCost
from loraplex.simulator.step_time import seconds_of


class PlanTime:
    def __init__(self, cost: StepCost, shape: Shape) -> None:
        self._latency = cost.latency.array()
        self._interval = cost.interval.array() if shape.pp > 1 else self._latency
        # Compiles now, or loads what was compiled: not in the first step, which others may be timing.
        seconds_of(self._latency, *np.zeros(8))

    def seconds(self, plan: StepPlan, *, num_adapters: int, adapter_bytes: float) -> tuple[float, float]:
        """Of a plan with at least one row: through all stages, and in the slowest of them (with one stage the same).
        ``num_adapters``: distinct ones; ``adapter_bytes``: theirs, whole ones whatever the shape."""
        sizes = np.array([(len(row.token_ids), row.start) for row in plan.rows], dtype=np.float64)
        tokens, start = sizes[:, 0], sizes[:, 1]
        prefill = tokens > 1
        chunk, behind = tokens[prefill], start[prefill]
        composition = (
            float(np.count_nonzero(prefill)),
            float(chunk.sum()),
            float((chunk * behind + chunk * (chunk + 1) / 2).sum()),
            float(np.count_nonzero(~prefill)),
            float((start + tokens).sum()),
            float(num_adapters),
            float(adapter_bytes),
            float(sum(len(row.token_ids) for row in plan.rows if row.adapter is not None)),
        )
        return seconds_of(self._latency, *composition), seconds_of(self._interval, *composition)
