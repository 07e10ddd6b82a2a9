"""Every metric is of the catalogue, its labels are bounded, and a running platform exposes all of it and no more."""

import ast
import random
import re
from pathlib import Path
from typing import Any

import pytest
from loraplex.core.control import ReplicaRoute, TraceStoreStatus
from loraplex.core.ids import BaseModelId, Digest, ReplicaId, TenantName
from loraplex.core.plan import Plan
from loraplex.core.rollout import DecisionKind, DecisionRecord, FleetStatus, PlanRecord, PlanState
from loraplex.core.wire import LoadReport
from loraplex.telemetry import catalogue
from loraplex.telemetry.catalogue import CATALOGUE
from loraplex.telemetry.config import TelemetryConfig
from loraplex.telemetry.metrics import GatewayMetrics

from tests.telemetry.conftest import ACME_KEY, GLOBEX_KEY, Platform

ROOT = Path(__file__).parents[2]
NAMES = {spec.name for spec in CATALOGUE}


def finish(
    metrics: GatewayMetrics, tenant: str, *, adapter: str | None = None, status: int = 200, now_s: float = 0.0
) -> None:
    metrics.started()
    metrics.finished(
        endpoint="completions",
        tenant=TenantName(tenant),
        adapter=adapter,
        status=status,
        prompt_tokens=3,
        cached_tokens=1,
        output_tokens=2,
        ttft_s=0.1,
        tpot_s=0.01,
        e2e_s=0.2,
        now_s=now_s,
    )


def exposed(text: str) -> set[str]:
    return {name for name, _ in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)}


def told(text: str, name: str) -> list[str]:
    return re.findall(rf"^{name}(?:{{.*}})? .*$", text, re.MULTILINE)


def test_every_name_is_ours_and_tells_its_unit() -> None:
    assert len(NAMES) == len(CATALOGUE)
    for spec in CATALOGUE:
        assert re.fullmatch(r"loraplex_[a-z0-9_]+", spec.name)
        assert spec.name.endswith("_total") == (spec.kind == "counter"), spec.name
        assert spec.help.endswith("."), spec.name
        assert bool(spec.buckets) == (spec.kind == "histogram"), spec.name
        if spec.unit == "seconds":
            assert "_seconds" in spec.name
        if spec.unit == "share":
            assert spec.name.endswith("_ratio")
        if "tenant" in spec.label_names and "adapter" not in spec.label_names:
            assert spec.kind == "counter", f"{spec.name}: tenants have counters only"


def test_nothing_is_registered_beside_the_catalogue() -> None:
    """Prometheus is imported by the telemetry alone, and its instruments are made in one file, from specs."""
    for path in ROOT.glob("*/loraplex*/**/*.py"):
        imported = {
            node.module if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        if any(name and name.startswith("prometheus_client") for name in imported):
            assert path.parent.name == "telemetry", path
            if path.name != "instruments.py":
                assert not re.search(r"\b(Counter|Gauge|Histogram|Summary|Info|Enum)\(\s*f?[\"']", path.read_text()), (
                    path
                )


async def test_a_running_platform_exposes_the_catalogue_and_nothing_else(platform: Platform) -> None:
    async with platform.client(ACME_KEY) as acme, platform.client(GLOBEX_KEY) as globex:
        for model in ("tiny-base", "pirate"):
            body = {"model": model, "prompt": "Many tenants share one base model.", "max_tokens": 4, "seed": 1}
            assert (await acme.post("/v1/completions", json=body)).status_code == 200
        assert (await globex.post("/v1/completions", json={"model": "pirate", "prompt": "x"})).status_code == 404
    text = await platform.metrics_with("loraplex_trace_store_rows{", "loraplex_fleet_attainment_ratio ")
    assert exposed(text) == NAMES
    # What is known of a platform that has served requests and planned nothing.
    planned = {catalogue.PLANNER_DECISIONS, catalogue.PLANNER_ATTAINMENT, catalogue.PLANNER_GAIN}
    silent = {spec for spec in CATALOGUE if not all(told(text, series) for series in spec.series_names)}
    assert silent <= planned | {catalogue.CONTROL_ERRORS}
    for line in (
        'loraplex_tenant_requests_total{outcome="ok",tenant="acme"} 2.0',
        'loraplex_tenant_requests_total{outcome="client_error",tenant="globex"} 1.0',
        'loraplex_adapter_requests_total{adapter="pirate",outcome="ok",tenant="acme"} 1.0',
        'loraplex_adapter_output_tokens_total{adapter="pirate",tenant="acme"} 4.0',
        'loraplex_fleet_groups{state="serving"} 1.0',
        "loraplex_gateway_ready 1.0",
    ):
        assert line in text
    assert not [line for line in text.splitlines() if "_created" in line]
    everyone = await platform.metrics(None)
    assert exposed(everyone) == NAMES
    assert "acme" not in everyone
    assert "pirate" not in everyone
    assert 'loraplex_adapter_requests_total{outcome="ok"} 1.0' in everyone


def crowd(num_adapters: int, num_tenants: int, num_replicas: int) -> GatewayMetrics:
    """The names are as long as they usually are; every outcome and status occurs, requests are few or many by Zipf's
    law."""
    metrics = GatewayMetrics()
    draw = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(num_adapters)]
    indices = [*range(num_adapters), *draw.choices(range(num_adapters), weights, k=4 * num_adapters)]
    for number, index in enumerate(indices):
        for status in (200, 429, 404, 499, 500):
            tenant, adapter = f"tenant-{index % num_tenants:03d}-incorporated", f"support-assistant-v{index:04d}"
            finish(metrics, tenant, adapter=adapter, status=status, now_s=number / 10)
    routes = tuple(
        ReplicaRoute(
            replica_id=ReplicaId(f"llama-3.1-8b-instruct-{index:02d}"),
            base_model_id=BaseModelId("llama-3.1-8b-instruct"),
            address="10.0.0.1:50000",
            group=f"group-{index:02d}",
            gpu="h100-80gb",
        )
        for index in range(num_replicas)
    )
    load = LoadReport(
        num_running=256,
        generated_tokens=123_456_789,
        busy_s=1234.56789,
        resident_adapters=tuple(Digest(f"{index:064x}") for index in range(num_adapters)),
    )
    metrics.replicas.replace({route.replica_id: load for route in routes}, routes)
    return metrics


def test_two_thousand_adapters_and_a_hundred_tenants_stay_small() -> None:
    metrics = crowd(2000, 100, 32)
    text = metrics.render(per_tenant=True)
    assert len(text) < 200_000, f"{len(text)} bytes"
    assert len(set(re.findall(r'adapter="([^"]*)"', text.decode()))) == 21
    assert len(set(re.findall(r'tenant="(tenant-[^"]*)"', text.decode()))) == 100
    print(f"{len(text)} bytes with 2,000 adapters, 100 tenants and 32 replicas")


def test_labels_stay_within_what_the_catalogue_says() -> None:
    text = crowd(2000, 300, 32).render(per_tenant=True).decode()
    for spec in CATALOGUE:
        for label in spec.labels:
            pattern = rf'^{spec.series_names[0]}{{(?:.*,)?{label.name}="([^"]*)"'
            values = set(re.findall(pattern, text, re.MULTILINE))
            assert len(values) <= label.max_values, (spec.name, label.name)


def test_requests_of_all_adapters_are_counted_once_each() -> None:
    metrics = GatewayMetrics(TelemetryConfig(max_adapters=3, adapter_window_s=10.0))
    for index in range(300):
        finish(metrics, "acme", adapter=f"a{index % 10}", now_s=0.1)
    series = told(metrics.render(per_tenant=True).decode(), "loraplex_adapter_requests_total")
    assert len(series) == 4
    assert sum(float(line.rsplit(" ", 1)[1]) for line in series) == 300


def test_who_becomes_busy_gets_a_label_and_who_was_loses_it() -> None:
    metrics = GatewayMetrics(TelemetryConfig(max_adapters=1, adapter_window_s=10.0))
    finish(metrics, "acme", adapter="old", now_s=0.0)
    for _ in range(5):
        finish(metrics, "acme", adapter="new", now_s=1.0)
    text = metrics.render(per_tenant=True).decode()
    assert 'loraplex_adapter_requests_total{adapter="other",outcome="ok",tenant="other"} 5.0' in text
    finish(metrics, "acme", adapter="new", now_s=11.0)
    text = metrics.render(per_tenant=True).decode()
    assert 'loraplex_adapter_requests_total{adapter="new",outcome="ok",tenant="acme"} 1.0' in text
    assert 'loraplex_adapter_requests_total{adapter="other",outcome="ok",tenant="other"} 5.0' in text
    assert 'adapter="old"' not in text


def test_tenants_are_bounded() -> None:
    metrics = GatewayMetrics(TelemetryConfig(max_tenants=2))
    for i in range(50):
        finish(metrics, f"tenant-{i}")
    text = metrics.render(per_tenant=True).decode()
    assert set(re.findall(r'tenant="([^"]*)"', text)) == {"tenant-0", "tenant-1", "other"}
    assert 'loraplex_tenant_tokens_total{kind="prompt",tenant="other"} 144.0' in text
    assert "loraplex_gateway_running_requests 0.0" in text


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (404, "client_error"), (429, "limited"), (499, "client_gone"), (500, "failed"), (503, "failed")],
)
def test_outcomes(status: int, outcome: str) -> None:
    metrics = GatewayMetrics()
    finish(metrics, "acme", status=status)
    text = metrics.render(per_tenant=True).decode()
    assert f'loraplex_tenant_requests_total{{outcome="{outcome}",tenant="acme"}} 1.0' in text
    assert f'loraplex_gateway_requests_total{{endpoint="completions",status="{status}"}} 1.0' in text


def test_replicas_that_are_gone_disappear() -> None:
    metrics = GatewayMetrics()
    metrics.replicas.replace({ReplicaId("a"): LoadReport(num_running=3), ReplicaId("b"): LoadReport()}, ())
    assert 'loraplex_replica_running_requests{replica="a"} 3.0' in metrics.render(per_tenant=True).decode()
    metrics.replicas.replace({ReplicaId("b"): LoadReport()}, ())
    text = metrics.render(per_tenant=True).decode()
    assert 'replica="a"' not in text
    assert 'loraplex_replica_running_requests{replica="b"} 0.0' in text


def decision(number: int, **known: Any) -> DecisionRecord:
    return DecisionRecord(number=number, at_s=1.0, kind=DecisionKind.KEPT, plan_version=3, reason="", **known)


def test_the_fleet_as_the_controller_tells_it() -> None:
    metrics = GatewayMetrics()
    plan = PlanRecord(plan=Plan(version=3, groups=()), source="admin", state=PlanState.SETTLED, created_s=1.0)
    status = FleetStatus(mode="auto", active=plan, settled=True, groups=(), problem="", attainment=0.75)
    metrics.fleet.replace(status, [decision(7)])
    assert "loraplex_planner_decisions_total{" not in metrics.render(per_tenant=True).decode()
    known = decision(8, attainment_before=0.5, predicted_gain=0.25, attainment_after=0.875)
    for _ in range(2):
        metrics.fleet.replace(status, [decision(9), known, decision(7)])
    text = metrics.render(per_tenant=True).decode()
    for line in (
        'loraplex_planner_decisions_total{kind="kept"} 2.0',
        "loraplex_plan_version 3.0",
        "loraplex_plan_settled 1.0",
        "loraplex_fleet_attainment_ratio 0.75",
        'loraplex_planner_attainment_ratio{when="before"} 0.5',
        'loraplex_planner_attainment_ratio{when="after"} 0.875',
        "loraplex_planner_predicted_gain_ratio 0.25",
    ):
        assert line in text
    metrics.fleet.unknown()
    assert not told(metrics.render(per_tenant=True).decode(), "loraplex_plan_version")


def test_totals_of_the_trace_recorder_are_counted_once_and_the_store_is_shown() -> None:
    metrics = GatewayMetrics()
    for dropped in (2, 5, 5):
        metrics.trace_recorder(sent=10, dropped=dropped, refused=0, buffered=7 - dropped, failed_sends=1)
    metrics.trace_store(
        TraceStoreStatus(
            url="/t",
            received_rows=9,
            written_rows=4,
            buffered_rows=2,
            dropped_rows=3,
            repeated_batches=0,
            last_error=None,
        )
    )
    text = metrics.render(per_tenant=False).decode()
    for line in (
        'loraplex_trace_recorder_rows_total{outcome="sent"} 10.0',
        'loraplex_trace_recorder_rows_total{outcome="dropped"} 5.0',
        "loraplex_trace_recorder_failed_sends_total 1.0",
        "loraplex_trace_recorder_buffered_rows 2.0",
        'loraplex_trace_store_rows{state="dropped"} 3.0',
    ):
        assert line in text
