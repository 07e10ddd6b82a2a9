"""What a replay is held against: targets, and a simulation of the same requests. Called by ``replay``.

Owns the options' meaning and how the comparison is printed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loraplex.cli.output import print_table
from loraplex.core.errors import BadConfig
from loraplex.core.plan import Plan
from loraplex.loadgen.comparison import Compared, shown_difference
from loraplex.loadgen.outcomes import Outcomes
from loraplex.loadgen.schedule import PlannedRequest
from loraplex.simulator.types import Slo

if TYPE_CHECKING:
    from loraplex.planner.fleet import Fleet


class Simulator(StrEnum):
    EXACT = "exact"
    FAST = "fast"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    slo: Slo | None
    plan: Plan | None
    fleet: "Fleet | None"
    simulator: Simulator

    @classmethod
    def of(cls, *, slo: str | None, plan: Path | None, fleet: Path | None, simulator: Simulator) -> Self:
        """Reads the files. BadConfig naming the option or the key, NotFound, InvalidInput."""
        if slo is None and plan is None and fleet is None:
            return cls(slo=None, plan=None, fleet=None, simulator=simulator)
        # Only now: planner and simulator take a second to import.
        from loraplex.cli.plan import parse_slo, read_fleet, read_plan

        if (plan is None) != (fleet is None):
            raise BadConfig("--against-simulation PLAN and --fleet FLEET go together")
        planned = None if plan is None else read_plan(plan)
        layout = None if fleet is None else read_fleet(fleet)
        if planned is not None and layout is not None:
            planned = layout.fitting(planned, where=str(plan))
        return cls(slo=None if slo is None else parse_slo(slo), plan=planned, fleet=layout, simulator=simulator)

    def predict(self, schedule: Sequence[PlannedRequest]) -> Outcomes | None:
        """None without a plan. InvalidInput for requests that the plan has no place for."""
        if self.plan is None or self.fleet is None:
            return None
        from loraplex.loadgen.prediction import predict
        from loraplex.simulator.exact import simulate_exact
        from loraplex.simulator.fast import simulate

        bases = dict.fromkeys(placed.base_model_id for group in self.plan.groups for placed in group.bases)
        return predict(
            schedule,
            self.plan,
            costs=self.fleet.costs(bases),
            sizes=self.fleet.sizes,
            engine=self.fleet.engine,
            slo=self.slo or Slo(),
            simulator=simulate_exact if self.simulator is Simulator.EXACT else simulate,
        )


def comparison_json(figures: Sequence[Compared]) -> dict[str, Any]:
    """By name; null where a side has none."""
    return {
        figure.name: {
            "measured": figure.measured,
            "predicted": figure.predicted,
            "difference": figure.difference,
        }
        for figure in figures
    }


def print_comparison(figures: Sequence[Compared]) -> None:
    rows = []
    for figure in figures:
        name, scale = (figure.name, 1) if figure.is_share else (f"{figure.name.removesuffix('_s')} ms", 1000)
        sides = [None if value is None else scale * value for value in (figure.measured, figure.predicted)]
        rows.append([name, *sides, shown_difference(figure)])
    print_table(["", "measured", "predicted", "difference"], rows)
