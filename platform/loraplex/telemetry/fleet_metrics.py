"""What the controller told this gateway last: the plan, the groups, what was decided and what came of it."""

from collections import Counter
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from loraplex.core.rollout import DecisionRecord, FleetStatus, GroupState
from loraplex.telemetry import catalogue
from loraplex.telemetry.instruments import Told, Values, counter
from loraplex.telemetry.metric import MetricSpec

_TOLD = (
    catalogue.PLAN_VERSION,
    catalogue.PLAN_SETTLED,
    catalogue.FLEET_PROBLEM,
    catalogue.FLEET_GROUPS,
    catalogue.FLEET_ATTAINMENT,
    catalogue.PLANNER_ATTAINMENT,
    catalogue.PLANNER_GAIN,
)


class FleetMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._told = Told(_TOLD, registry)
        self._decisions = counter(catalogue.PLANNER_DECISIONS, registry)
        self._last_number: int | None = None

    def unknown(self) -> None:
        """The controller does not tell."""
        self._told.replace({})

    def replace(self, status: FleetStatus, decisions: Sequence[DecisionRecord]) -> None:
        """``decisions``: the newest ones, newest first. Those that were there at the first call are not counted."""
        states = Counter(group.state for group in status.groups)
        values: dict[MetricSpec, Values] = {
            catalogue.PLAN_VERSION: {(): status.active.plan.version},
            catalogue.PLAN_SETTLED: {(): status.settled},
            catalogue.FLEET_PROBLEM: {(): bool(status.problem)},
            catalogue.FLEET_GROUPS: {(state.value,): states[state] for state in GroupState},
            catalogue.FLEET_ATTAINMENT: _known((), status.attainment),
            catalogue.PLANNER_ATTAINMENT: _outcome(decisions),
            catalogue.PLANNER_GAIN: _known((), _newest_gain(decisions)),
        }
        self._told.replace(values)
        for decision in decisions:
            if self._last_number is not None and decision.number > self._last_number:
                self._decisions.labels(decision.kind.value).inc()
        self._last_number = max((decision.number for decision in decisions), default=self._last_number or 0)


def _known(labels: tuple[str, ...], value: float | None) -> Values:
    return {} if value is None else {labels: value}


def _outcome(decisions: Sequence[DecisionRecord]) -> Values:
    for decision in decisions:
        if decision.attainment_before is not None and decision.attainment_after is not None:
            return {("before",): decision.attainment_before, ("after",): decision.attainment_after}
    return {}


def _newest_gain(decisions: Sequence[DecisionRecord]) -> float | None:
    return next((one.predicted_gain for one in decisions if one.predicted_gain is not None), None)
