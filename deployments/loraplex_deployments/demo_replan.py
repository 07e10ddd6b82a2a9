"""The whole loop on one machine: traffic is recorded, the controller plans from it, the cluster changes, attainment
rises. ``make demo-replan`` runs it; it prints attainment before and after.
"""

import asyncio
import contextlib
import sys
import time

import msgspec
from loraplex.core.errors import Unavailable
from loraplex.loadgen.completion import Sample
from loraplex.loadgen.outcomes import Outcomes, attainment

from loraplex_deployments.replan_platform import RATES, SLO, ReplanPlatform, decision_line, demo_setup, make_trace

_DURATION_S = 40.0
_PLAN_TIMEOUT_S = 180.0


class ReplanDemoResult(msgspec.Struct, frozen=True, kw_only=True):
    executor: str
    requests: int
    """Of the trace, which is replayed before and after."""
    attainment_before: float
    attainment_after: float
    failed_before: int
    """Refused because no first token would have come in time, as those after."""
    failed_after: int
    groups_before: tuple[str, ...]
    """Of one replica each: base and shape."""
    groups_after: tuple[str, ...]
    decisions: tuple[str, ...]
    """Of the controller, in order."""


def run_replan_demo() -> ReplanDemoResult:
    """Unavailable when the controller finds no better plan in time."""
    demo = ReplanPlatform.start(_say, mode="auto", setup=demo_setup(_DURATION_S + 20))
    with contextlib.closing(demo):
        trace = make_trace(_DURATION_S)
        _say(f"replaying {len(trace)} requests over {_DURATION_S:.0f} s: {RATES}")
        groups_before = demo.groups
        before = asyncio.run(demo.replay(trace, seed=1))
        _say(f"attainment {_attainment(before):.3f} with {', '.join(groups_before)}; the controller plans")
        version = _wait_planned(demo)
        groups_after = demo.groups
        _say(f"plan {version} is in force: {', '.join(groups_after)}; replaying again")
        after = asyncio.run(demo.replay(trace, seed=2))
        return ReplanDemoResult(
            executor=demo.setup.executor,
            requests=len(trace),
            attainment_before=_attainment(before),
            attainment_after=_attainment(after),
            failed_before=sum(sample.error is not None for sample in before),
            failed_after=sum(sample.error is not None for sample in after),
            groups_before=groups_before,
            groups_after=groups_after,
            decisions=tuple(map(decision_line, demo.decisions())),
        )


def _attainment(samples: list[Sample]) -> float:
    found = attainment(Outcomes.of_samples(samples), SLO).attainment
    assert found is not None, "nothing was sent"
    return found


def _wait_planned(demo: ReplanPlatform) -> int:
    """The version of the planner's plan, once the cluster is there."""
    deadline_s = time.monotonic() + _PLAN_TIMEOUT_S
    while time.monotonic() < deadline_s:
        status = demo.status
        if status.active.source == "planner" and status.settled:
            return status.active.plan.version
        time.sleep(0.5)
    decided = demo.platform.call("decisions", 5)
    raise Unavailable(f"no plan of the planner is in force after {_PLAN_TIMEOUT_S:.0f} s: {decided}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there
        result = run_replan_demo()
    print(msgspec.json.format(msgspec.json.encode(result)).decode())
    sys.exit(result.attainment_after <= result.attainment_before)


if __name__ == "__main__":
    main()
