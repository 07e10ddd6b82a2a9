"""The platform's dashboards. ``python -m loraplex.telemetry.dashboards FOLDER`` writes them, one JSON file each; the
chart's lie in ``helm/loraplex/dashboards``.

Every gateway tells of all replicas and of the fleet, so these are the largest over the gateways; what gateways count
themselves is their sum.
"""

import sys
from pathlib import Path

from loraplex.telemetry import catalogue as c
from loraplex.telemetry.grafana import MINE, Dashboard, Panel
from loraplex.telemetry.metric import MetricSpec

_RANGE = "[$__rate_interval]"


def _rate(spec: MetricSpec, *by: str, where: str = "") -> str:
    """Per second, summed over gateways."""
    return f"sum{_by(by)} (rate({_select(spec.name, where)}{_RANGE}))"


def _told_rate(spec: MetricSpec, *by: str, where: str = "") -> str:
    """Per second, of what each gateway was told alike."""
    return f"max{_by(by)} (rate({_select(spec.name, where)}{_RANGE}))"


def _sum(spec: MetricSpec, *by: str) -> str:
    return f"sum{_by(by)} ({_select(spec.name)})"


def _told(spec: MetricSpec, *by: str, where: str = "") -> str:
    return f"max{_by(by)} ({_select(spec.name, where)})"


def _quantile(share: float, spec: MetricSpec) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({_select(spec.name + '_bucket')}{_RANGE})))"


def _mean(spec: MetricSpec, *by: str, where: str = "") -> str:
    parts = (f"sum{_by(by)} (rate({_select(spec.name + end, where)}{_RANGE}))" for end in ("_sum", "_count"))
    return " / ".join(parts)


def _select(name: str, where: str = "") -> str:
    return f"{name}{{{MINE}{', ' + where if where else ''}}}"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _latency(title: str, spec: MetricSpec) -> Panel:
    return Panel(title=title, unit="s", series={f"p{share}": _quantile(share / 100, spec) for share in (50, 95, 99)})


OVERVIEW = Dashboard(
    name="overview",
    title="Loraplex: overview",
    panels=(
        Panel(title="Requests per second", unit="reqps", series={"{{status}}": _rate(c.REQUESTS, "status")}),
        Panel(title="Tokens per second", unit="short", series={"{{kind}}": _rate(c.TOKENS, "kind")}),
        _latency("Time to first token", c.TTFT),
        _latency("Time per output token", c.TPOT),
        _latency("End to end", c.E2E),
        Panel(
            title="In flight and queued",
            unit="short",
            series={"in flight": _sum(c.RUNNING), "queued": _sum(c.QUEUED)},
            about="Queued: no replica has room. When it stays above zero the cluster is too small for the traffic.",
        ),
        Panel(title="Refused calls per second", unit="reqps", series={"{{status}}": _rate(c.REFUSED, "status")}),
        Panel(
            title="Requests in each replica",
            unit="short",
            series={
                "{{replica}} running": _told(c.REPLICA_RUNNING, "replica"),
                "{{replica}} waiting": _told(c.REPLICA_WAITING, "replica"),
            },
        ),
        Panel(
            title="Gateways that can serve, and their controller",
            unit="short",
            series={
                "ready gateways": _sum(c.READY),
                "failed calls to the controller per second": _rate(c.CONTROL_ERRORS),
                "refused snapshots per second": _rate(c.STALE_SNAPSHOTS),
            },
        ),
        Panel(
            title="Snapshot in use",
            unit="short",
            series={
                "epoch": _told(c.SNAPSHOT_EPOCH),
                "oldest epoch": f"min ({_select(c.SNAPSHOT_EPOCH.name)})",
                "version": _told(c.SNAPSHOT_VERSION),
            },
            about="Two epochs at once for longer than a minute: gateways follow different controllers.",
        ),
        Panel(
            title="Trace rows",
            unit="short",
            series={
                "{{outcome}} per second": _rate(c.TRACE_ROWS, "outcome"),
                "buffered": _sum(c.TRACE_BUFFERED),
                "repeated deliveries per second": _rate(c.TRACE_FAILED_SENDS),
            },
        ),
        Panel(title="Trace rows in the controller", unit="short", series={"{{state}}": _told(c.TRACE_STORE, "state")}),
    ),
)

_TENANT = 'tenant=~"$tenant"'
TENANTS = Dashboard(
    name="tenants",
    title="Loraplex: tenants",
    choices=(("tenant", c.TENANT_REQUESTS.name),),
    panels=(
        Panel(
            title="Requests per second, the ten largest",
            unit="reqps",
            series={"{{tenant}}": f"topk(10, {_rate(c.TENANT_REQUESTS, 'tenant', where=_TENANT)})"},
        ),
        Panel(
            title="Output tokens per second, the ten largest",
            unit="short",
            series={
                "{{tenant}}": "topk(10, " + _rate(c.TENANT_TOKENS, "tenant", where=f'{_TENANT}, kind="output"') + ")"
            },
        ),
        Panel(
            title="Prompt tokens per second, the ten largest",
            unit="short",
            series={
                "{{tenant}}": "topk(10, " + _rate(c.TENANT_TOKENS, "tenant", where=f'{_TENANT}, kind="prompt"') + ")"
            },
        ),
        Panel(
            title="Share of prompt tokens from the prefix cache",
            unit="percentunit",
            series={
                "{{tenant}}": _rate(c.TENANT_TOKENS, "tenant", where=f'{_TENANT}, kind="cached"')
                + " / "
                + _rate(c.TENANT_TOKENS, "tenant", where=f'{_TENANT}, kind="prompt"')
            },
        ),
        Panel(
            title="Requests over a limit per second, the ten largest",
            unit="reqps",
            series={
                "{{tenant}}": "topk(10, "
                + _rate(c.TENANT_REQUESTS, "tenant", where=f'{_TENANT}, outcome="limited"')
                + ")"
            },
            about="Answered with 429: the tenant's own limit, or no replica can serve in time.",
        ),
        Panel(
            title="Failed requests per second, the ten largest",
            unit="reqps",
            series={
                "{{tenant}}": "topk(10, "
                + _rate(c.TENANT_REQUESTS, "tenant", where=f'{_TENANT}, outcome="failed"')
                + ")"
            },
        ),
    ),
)

_ADAPTER = 'adapter=~"$adapter"'
ADAPTERS = Dashboard(
    name="adapters",
    title="Loraplex: adapters",
    choices=(("adapter", c.ADAPTER_REQUESTS.name),),
    panels=(
        Panel(
            title="Requests per second of the busiest adapters",
            unit="reqps",
            series={"{{tenant}}/{{adapter}}": _rate(c.ADAPTER_REQUESTS, "tenant", "adapter", where=_ADAPTER)},
        ),
        Panel(
            title="Output tokens per second",
            unit="short",
            series={"{{tenant}}/{{adapter}}": _rate(c.ADAPTER_OUTPUT_TOKENS, "tenant", "adapter", where=_ADAPTER)},
        ),
        Panel(
            title="Mean time to first token",
            unit="s",
            series={"{{tenant}}/{{adapter}}": _mean(c.ADAPTER_TTFT, "tenant", "adapter", where=_ADAPTER)},
        ),
        Panel(
            title="Requests that did not end well per second",
            unit="reqps",
            series={
                "{{tenant}}/{{adapter}} {{outcome}}": _rate(
                    c.ADAPTER_REQUESTS, "tenant", "adapter", "outcome", where=f'{_ADAPTER}, outcome!="ok"'
                )
            },
        ),
        Panel(
            title="Adapters on the accelerators",
            unit="short",
            series={"{{replica}}": _told(c.REPLICA_RESIDENT_ADAPTERS, "replica")},
        ),
        Panel(
            title="Adapter copies and hits per second",
            unit="short",
            series={
                "{{replica}} waited for": _told_rate(c.REPLICA_ADAPTER_LOADS, "replica"),
                "{{replica}} ahead": _told_rate(c.REPLICA_ADAPTER_PREFETCHES, "replica"),
                "{{replica}} hits": _told_rate(c.REPLICA_ADAPTER_HITS, "replica"),
            },
            about="Many copies that requests wait for: the adapters in use do not fit; give the bases more replicas.",
        ),
    ),
)

_REPLICA = 'replica=~"$replica"'
ENGINE = Dashboard(
    name="engine",
    title="Loraplex: engine",
    choices=(("replica", c.REPLICA_INFO.name),),
    panels=(
        Panel(
            title="Output tokens per second",
            unit="short",
            series={"{{replica}}": _told_rate(c.REPLICA_GENERATED_TOKENS, "replica", where=_REPLICA)},
        ),
        Panel(
            title="Requests per step",
            unit="short",
            series={
                "{{replica}}": _told_rate(c.REPLICA_GENERATED_TOKENS, "replica", where=_REPLICA)
                + " / "
                + _told_rate(c.REPLICA_STEPS, "replica", where=_REPLICA)
            },
            about="Output tokens of a step: how far batching goes.",
        ),
        Panel(
            title="Mean time of a step",
            unit="s",
            series={
                "{{replica}}": _told_rate(c.REPLICA_BUSY, "replica", where=_REPLICA)
                + " / "
                + _told_rate(c.REPLICA_STEPS, "replica", where=_REPLICA)
            },
        ),
        Panel(
            title="Time in steps per second",
            unit="percentunit",
            series={"{{replica}}": _told_rate(c.REPLICA_BUSY, "replica", where=_REPLICA)},
            about="1: never idle; more where several steps are in flight.",
        ),
        Panel(
            title="Running and waiting requests",
            unit="short",
            series={
                "{{replica}} running": _told(c.REPLICA_RUNNING, "replica", where=_REPLICA),
                "{{replica}} waiting": _told(c.REPLICA_WAITING, "replica", where=_REPLICA),
            },
        ),
        Panel(
            title="Prompt tokens not yet prefilled",
            unit="short",
            series={"{{replica}}": _told(c.REPLICA_QUEUED_TOKENS, "replica", where=_REPLICA)},
        ),
        Panel(
            title="Share of pages in use",
            unit="percentunit",
            series={
                "{{replica}}": f"1 - {_told(c.REPLICA_FREE_PAGES, 'replica', where=_REPLICA)}"
                f" / {_told(c.REPLICA_PAGES, 'replica', where=_REPLICA)}"
            },
            about="KV of running requests and adapters that they use; what is only cached counts as free.",
        ),
        Panel(
            title="Preemptions, and prompt tokens from the prefix cache, per second",
            unit="short",
            series={
                "{{replica}} preemptions": _told_rate(c.REPLICA_PREEMPTIONS, "replica", where=_REPLICA),
                "{{replica}} cached tokens": _told_rate(c.REPLICA_CACHED_TOKENS, "replica", where=_REPLICA),
            },
        ),
        Panel(
            title="Replicas by base model and GPU",
            unit="short",
            series={
                "{{base_model}} {{gpu}}": "count by (base_model, gpu) (max by (replica, base_model, gpu) "
                f"({_select(c.REPLICA_INFO.name, _REPLICA)}))"
            },
        ),
    ),
)

PLANNER = Dashboard(
    name="planner",
    title="Loraplex: planner",
    panels=(
        Panel(title="Plan in force", unit="short", series={"version": _told(c.PLAN_VERSION)}),
        Panel(
            title="Settled, and held up",
            unit="short",
            series={"settled": _told(c.PLAN_SETTLED), "held up": _told(c.FLEET_PROBLEM)},
            about="Settled: the cluster is as the plan says. Held up: `loraplex plan status` says why.",
        ),
        Panel(title="Groups", unit="short", series={"{{state}}": _told(c.FLEET_GROUPS, "state")}),
        Panel(
            title="SLO attainment over the planning window",
            unit="percentunit",
            series={"now": _told(c.FLEET_ATTAINMENT)},
        ),
        Panel(
            title="The newest decision that was measured",
            unit="percentunit",
            series={"{{when}}": _told(c.PLANNER_ATTAINMENT, "when"), "predicted gain": _told(c.PLANNER_GAIN)},
        ),
        Panel(
            title="Decisions in ten minutes",
            unit="short",
            series={"{{kind}}": f"max by (kind) (increase({_select(c.PLANNER_DECISIONS.name)}[10m]))"},
        ),
    ),
)

DASHBOARDS = (OVERVIEW, TENANTS, ADAPTERS, ENGINE, PLANNER)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.name}.json").write_text(dashboard.json(), "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
