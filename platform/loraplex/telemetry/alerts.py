"""The platform's alerts, each with what to do. ``python -m loraplex.telemetry.alerts FILE`` writes them for the chart,
which puts in whose series they are about and the targets of its values.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from loraplex.telemetry import catalogue as c

MINE = "LORAPLEX_SERIES"
"""Stands for the selector of the release's series."""
ERROR_RATIO, TTFT_S, TPOT_S, QUEUED = (
    f"LORAPLEX_{name}" for name in ("ERROR_RATIO", "TTFT_S", "TPOT_S", "QUEUED_GENERATIONS")
)
"""Stand for the targets: values of the chart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    name: str
    expression: str
    """PromQL."""
    lasts: str
    """How long it must hold."""
    severity: Literal["critical", "warning"]
    summary: str
    runbook: str

    def rule(self) -> dict[str, object]:
        """As Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": self.lasts,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "runbook": self.runbook},
        }


def _late(spec_name: str) -> str:
    return f"histogram_quantile(0.95, sum by (le) (rate({spec_name}_bucket{{{MINE}}}[5m])))"


def _told_rate(name: str) -> str:
    """Of all replicas, each of which every gateway tells of."""
    return f"sum(max by (replica) (rate({name}{{{MINE}}}[10m])))"


_REQUESTS = c.REQUESTS.name
ALERTS = (
    Alert(
        name="LoraplexNoGateway",
        expression=f"absent({c.RUNNING.name}{{{MINE}}})",
        lasts="2m",
        severity="critical",
        summary="No gateway answers.",
        runbook="kubectl describe rayservice tells why; without gateway pods look at their events, with them at "
        "`loraplex deployed` on the head.",
    ),
    Alert(
        name="LoraplexNoReplica",
        expression=f"absent({c.REPLICA_STEPS.name}{{{MINE}}}) and on() {c.RUNNING.name}{{{MINE}}}",
        lasts="5m",
        severity="critical",
        summary="Gateways run, and no replica is connected.",
        runbook="`loraplex deployed` on the head names the replicas that are down and why.",
    ),
    Alert(
        name="LoraplexErrors",
        expression=f'sum(rate({_REQUESTS}{{{MINE}, status=~"5.."}}[5m])) / sum(rate({_REQUESTS}{{{MINE}}}[5m]))'
        f" > {ERROR_RATIO}",
        lasts="5m",
        severity="critical",
        summary="Generation requests fail.",
        runbook="The gateways' logs name the request ids; 503 means no replica, 500 a fault of ours.",
    ),
    Alert(
        name="LoraplexSlowFirstToken",
        expression=f"{_late(c.TTFT.name)} > {TTFT_S}",
        lasts="10m",
        severity="warning",
        summary="The 95th percentile of the time to the first token is above the target.",
        runbook="Look at queued generations and waiting requests: more replicas (workerGroups), or a plan for the "
        "traffic of now.",
    ),
    Alert(
        name="LoraplexSlowTokens",
        expression=f"{_late(c.TPOT.name)} > {TPOT_S}",
        lasts="10m",
        severity="warning",
        summary="The 95th percentile of the time per output token is above the target.",
        runbook="Steps are too full: lower engine.max_running or engine.max_step_tokens of the base, or give it more "
        "replicas.",
    ),
    Alert(
        name="LoraplexQueue",
        expression=f"sum({c.QUEUED.name}{{{MINE}}}) > {QUEUED}",
        lasts="5m",
        severity="warning",
        summary="Generations wait for a replica that takes them.",
        runbook="More replicas (workerGroups, base_models[].replicas), or lower quotas of the tenants that send them.",
    ),
    Alert(
        name="LoraplexPreemptions",
        expression=f"{_told_rate(c.REPLICA_PREEMPTIONS.name)} > 0.05 * sum(rate({_REQUESTS}{{{MINE}}}[10m]))",
        lasts="10m",
        severity="warning",
        summary="More than one request in twenty loses its pages and is computed again.",
        runbook="The arena is too small for engine.max_running: lower it, or give the base more replicas.",
    ),
    Alert(
        name="LoraplexAdaptersReloaded",
        expression=f"{_told_rate(c.REPLICA_ADAPTER_LOADS.name)} > 0.5 * {_told_rate(c.REPLICA_ADAPTER_HITS.name)}",
        lasts="15m",
        severity="warning",
        summary="Of three requests with an adapter one waits until it is copied to the accelerator.",
        runbook="The adapters in use do not fit: apply a plan for the traffic of now (`loraplex plan`), or give the "
        "base more replicas.",
    ),
    Alert(
        name="LoraplexPlanNotSettled",
        expression=f"max({c.PLAN_SETTLED.name}{{{MINE}}}) == 0",
        lasts="30m",
        severity="warning",
        summary="The cluster is not as the plan in force says.",
        runbook="`loraplex plan status` names the groups that are missing and why; `loraplex plan rollback` goes back.",
    ),
    Alert(
        name="LoraplexControllerHeldUp",
        expression=f"max({c.FLEET_PROBLEM.name}{{{MINE}}}) == 1",
        lasts="5m",
        severity="warning",
        summary="The controller moves nothing.",
        runbook="`loraplex plan status` says why: usually the control database is away.",
    ),
    Alert(
        name="LoraplexControllerAway",
        expression=f"sum(rate({c.CONTROL_ERRORS.name}{{{MINE}}}[5m])) > 0",
        lasts="5m",
        severity="warning",
        summary="Gateways do not reach the controller; they serve from what they know.",
        runbook="Look at the head pod and at the control database; Ray restarts the controller by itself.",
    ),
    Alert(
        name="LoraplexEpochsDiffer",
        expression=f"max({c.SNAPSHOT_EPOCH.name}{{{MINE}}}) - min({c.SNAPSHOT_EPOCH.name}{{{MINE}}}) > 0",
        lasts="5m",
        severity="warning",
        summary="Gateways follow different controllers.",
        runbook="A gateway that lags has lost the controller: restart its pod.",
    ),
    Alert(
        name="LoraplexTracesLost",
        expression=(
            f'sum(increase({c.TRACE_ROWS.name}{{{MINE}, outcome="dropped"}}[15m])) > 0'
            f' or max(delta({c.TRACE_STORE.name}{{{MINE}, state="dropped"}}[15m])) > 0'
        ),
        lasts="0m",
        severity="warning",
        summary="Trace rows were dropped.",
        runbook="The controller was away for long or traces.url cannot be written: look at its log on the head.",
    ),
)


def rules() -> str:
    """A list of rules as YAML, with placeholders."""
    return yaml.safe_dump([alert.rule() for alert in ALERTS], sort_keys=False, width=1000)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(rules(), "utf-8")
