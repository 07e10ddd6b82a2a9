"""``python -m loraplex.simulator.compare [SCENARIO ...] [--seeds N]``: how near the fast simulator is to the exact one.

The two choose at random, each its own way, among replicas that are alike; figures are means over several seeds, so that
what one run happens to draw does not count.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.fast import simulate
from loraplex.simulator.scenarios import SCENARIOS
from loraplex.simulator.types import Score, SimulationInput, SimulationResult

MAX_ATTAINMENT_ERROR = 0.01
MAX_TTFT_ERROR = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Means over seeds. Seconds."""

    attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    wall_s: float

    @classmethod
    def mean(cls, scores: Sequence[Score], wall_s: float) -> Self:
        def over(values: Iterable[float]) -> float:
            return float(np.mean(list(values)))

        return cls(
            attainment=over(score.attainment for score in scores),
            ttft_p50_s=over(score.ttft_s["p50"] for score in scores),
            ttft_p99_s=over(score.ttft_s["p99"] for score in scores),
            tpot_p50_s=over(score.tpot_s["p50"] for score in scores),
            wall_s=wall_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    fast: Figures
    exact: Figures

    @property
    def is_near(self) -> bool:
        fast, exact = self.fast, self.exact
        return (
            abs(fast.attainment - exact.attainment) <= MAX_ATTAINMENT_ERROR
            and abs(fast.ttft_p50_s / exact.ttft_p50_s - 1) <= MAX_TTFT_ERROR
            and abs(fast.ttft_p99_s / exact.ttft_p99_s - 1) <= MAX_TTFT_ERROR
        )


def compare(scenario: Callable[[int], SimulationInput], seeds: Sequence[int]) -> Comparison:
    """Both simulators on the same inputs."""

    def figures(simulator: Callable[[SimulationInput], SimulationResult]) -> Figures:
        start_s = time.perf_counter()
        scores = [simulator(scenario(seed)).score for seed in seeds]
        return Figures.mean(scores, time.perf_counter() - start_s)

    return Comparison(fast=figures(simulate), exact=figures(simulate_exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each scenario; default: 3")
    arguments = parser.parse_args()
    names = arguments.scenarios or list(SCENARIOS)
    for name in names:
        if name not in SCENARIOS:
            parser.error(f"no scenario {name!r}")
    simulate(SCENARIOS["steady"](0))  # Compiles.
    print(f"{'scenario':<20} {'attainment':>19} {'TTFT p50 ms':>25} {'TTFT p99 ms':>27} {'TPOT p50 ms':>15}   seconds")
    far = []
    for name in names:
        found = compare(SCENARIOS[name], range(arguments.seeds))
        print(f"{name:<20} {_line(found)}", flush=True)
        if not found.is_near:
            far.append(name)
    print(
        f"{len(names) - len(far)} of {len(names)} within {MAX_ATTAINMENT_ERROR} of attainment and "
        f"{MAX_TTFT_ERROR:.0%} of TTFT p50 and p99" + (f"; not: {', '.join(far)}" if far else "")
    )


def _line(found: Comparison) -> str:
    fast, exact = found.fast, found.exact
    parts = [f"{fast.attainment:.4f} / {exact.attainment:.4f}"]
    for name in ("ttft_p50_s", "ttft_p99_s"):
        ours, theirs = getattr(fast, name), getattr(exact, name)
        parts.append(f"{f'{ours * 1e3:.1f} / {theirs * 1e3:.1f}':>18} ({ours / theirs - 1:+.1%})")
    parts.append(f"{fast.tpot_p50_s * 1e3:>6.2f} / {exact.tpot_p50_s * 1e3:.2f}")
    return "  ".join(parts) + f"   {fast.wall_s:.2f} / {exact.wall_s:.1f}"


if __name__ == "__main__":
    main()
