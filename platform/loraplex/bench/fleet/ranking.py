"""Which plan served a load best, and whether that is more than chance: the same requests under several plans, compared
pair by pair. Pure. Called by ``__main__`` and the command ``bench fleet``.
"""

from dataclasses import dataclass

import numpy as np

from loraplex.bench.fleet.results import ALL, FleetRow
from loraplex.planner.chance import paired_interval
from loraplex.simulator.types import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    row: FleetRow
    attainment: float
    """Measured."""
    behind: float
    """Attainment less than the best row's."""
    interval: tuple[float, float]
    """95 % of the bootstrap's draws of ``behind``, over requests."""


def ranked(rows: list[FleetRow], *, seed: int = 0) -> tuple[Ranked, ...]:
    """Rows of one workload (at least one), the best first."""
    good = {index: _good(row) for index, row in enumerate(rows)}
    order = sorted(good, key=lambda index: -float(good[index].mean()))
    best = good[order[0]]
    return tuple(
        Ranked(
            row=rows[index],
            attainment=float(good[index].mean()),
            behind=float((best - good[index]).mean()),
            interval=paired_interval(best, good[index], seed=seed),
        )
        for index in order
    )


def ranking_lines(rows: list[FleetRow]) -> list[str]:
    """For each workload its plans, the best first: measured attainment, points behind the best, predicted."""
    lines = []
    for workload in dict.fromkeys(row.workload for row in rows):
        lines.append(f"{workload}:")
        for one in ranked([row for row in rows if row.workload == workload]):
            predicted = one.row.figures[ALL]["attainment"].predicted
            low, high = (100 * side for side in one.interval)
            who = f"{', '.join(one.row.placements)} ({one.row.groups})"
            line = f"  {who}: {one.attainment:.3f}, {100 * one.behind:.1f} points behind ({low:.1f} to {high:.1f})"
            lines.append(line if predicted is None else f"{line}; predicted {predicted:.3f}")
    return lines


def _good(row: FleetRow) -> FloatArray:
    return np.array([flag == "1" for flag in row.good], dtype=np.float64)
