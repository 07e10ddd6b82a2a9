"""The chart's dashboards are those of the source; every query is PromQL over metrics that a platform exposes."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from loraplex.controller.fleet.store import FleetStore, Reason
from loraplex.core.clock import SystemClock
from loraplex.core.errors import Unavailable
from loraplex.core.ids import TenantName
from loraplex.core.rollout import DecisionKind
from loraplex.core.tenant import TenantLimits
from loraplex.telemetry.catalogue import CATALOGUE
from loraplex.telemetry.dashboards import DASHBOARDS, write
from loraplex.telemetry.grafana import Dashboard
from loraplex.testing.tiny_adapter import tiny_adapter
from loraplex.testing.tiny_controller import upload_adapter
from prometheus_client.parser import text_string_to_metric_families

from tests.telemetry.conftest import ACME_KEY, Platform
from tests.telemetry.promtool import promtool

FOLDER = Path(__file__).parents[2] / "helm" / "loraplex" / "dashboards"
ACME = TenantName("acme")
SCRAPED = {"namespace": "ml", "service": "loraplex-gateways"}
SERIES = {series: spec for spec in CATALOGUE for series in spec.series_names}


def queries(dashboard: Dashboard) -> list[str]:
    return [query for panel in dashboard.panels for query in panel.series.values()]


def names(text: str) -> set[str]:
    return set(re.findall(r"\bloraplex_\w+", text))


def test_the_charts_files_are_what_the_source_says(tmp_path: Path) -> None:
    """After a change: python -m loraplex.telemetry.dashboards helm/loraplex/dashboards"""
    write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == made


def test_there_is_one_for_each_part() -> None:
    assert [dashboard.name for dashboard in DASHBOARDS] == ["overview", "tenants", "adapters", "engine", "planner"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_every_metric_and_label_is_in_the_catalogue(dashboard: Dashboard) -> None:
    assert len({panel.title for panel in dashboard.panels}) == len(dashboard.panels) > 0
    for panel in dashboard.panels:
        for legend, query in panel.series.items():
            assert names(query) <= SERIES.keys()
            assert query.count('namespace=~"$namespace", service=~"$service"') == len(re.findall(r"\bloraplex_", query))
            known = {label for name in names(query) for label in SERIES[name].label_names} | {"le"}
            grouped = {label for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")}
            assert grouped <= known, query
            assert set(re.findall(r"{{(\w+)}}", legend)) <= grouped, legend
    for label, metric in dashboard.choices:
        assert label in SERIES[metric].label_names


def test_no_metric_is_shown_nowhere() -> None:
    shown = {name for dashboard in DASHBOARDS for query in queries(dashboard) for name in names(query)}
    assert {spec.name for spec in CATALOGUE if not shown & set(spec.series_names)} == set()


def test_queries_are_promql(tmp_path: Path) -> None:
    rules: list[dict[str, Any]] = []
    for dashboard in DASHBOARDS:
        for number, query in enumerate(queries(dashboard)):
            text = re.sub(r"\$(?!__)\w+", ".*", query.replace("$__rate_interval", "5m"))
            assert "$" not in text
            rules.append({"record": f"{dashboard.name}:query_{number}", "expr": text})
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_the_json_is_what_grafana_reads(dashboard: Dashboard) -> None:
    content = json.loads(dashboard.json())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in content["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in content["panels"]}) == len(places)
    assert [variable["name"] for variable in content["templating"]["list"]][:3] == [
        "datasource",
        "namespace",
        "service",
    ]
    for panel in content["panels"]:
        assert panel["type"] == "timeseries"
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


async def test_every_query_finds_something_on_a_running_platform(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus' own engine evaluates them over what the platform exposed, after all has happened to it that they
    show."""
    text = await _after_an_eventful_life(platform, monkeypatch)
    samples = [
        {"series": f"{sample.name}{_shown(sample.labels)}", "values": f"{sample.value}x20"}
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    rules, checks = [], []
    for dashboard in DASHBOARDS:
        for number, query in enumerate(queries(dashboard)):
            name = f"{dashboard.name}_{number}"
            asked = re.sub(r"\$(?!__)\w+", ".*", query.replace("$__rate_interval", "5m"))
            rules.append({"alert": name, "expr": f"absent({asked})"})
            checks.append({"eval_time": "15m", "alertname": name, "exp_alerts": []})
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    tests = [{"interval": "1m", "input_series": samples, "alert_rule_test": checks}]
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", file)


def _shown(labels: dict[str, str]) -> str:
    """With what a scrape adds."""
    return "{" + ", ".join(f'{name}="{value}"' for name, value in ({**labels, **SCRAPED}).items()) + "}"


async def _after_an_eventful_life(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> str:
    body = {"model": "pirate", "prompt": "Many tenants share one base model.", "max_tokens": 4}
    controller = platform.controller
    async with platform.client(ACME_KEY) as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        # The planner decides, and what came of it is measured.
        store = FleetStore(controller._catalog, SystemClock(), epoch=controller.epoch)
        reason = Reason(text="nothing better", attainment_before=0.9, predicted_gain=0.01)
        decided = await store.decide(DecisionKind.KEPT, 0, reason)
        await store.set_outcome(decided.number, 0.95)
        # An adapter cannot be read; a tenant is over its limit; a call has no key.
        platform.machines.source.away = True
        await upload_adapter(controller, ACME, "lost", tiny_adapter(2))
        await _answered(client, body | {"model": "lost"}, 503)
        await controller.update_tenant(ACME, TenantLimits(requests_per_minute=1))
        await _answered(client, body, 429)
        async with platform.client(None) as stranger:
            assert (await stranger.get("/v1/models")).status_code == 401
    # The controller is away.
    with monkeypatch.context() as away:
        away.setattr(controller, "fleet_status", _away)
        await platform.metrics_with("loraplex_gateway_control_errors_total{")
    return await platform.metrics_with(
        "loraplex_trace_store_rows{", "loraplex_fleet_attainment_ratio ", "loraplex_planner_attainment_ratio{"
    )


async def _answered(client: httpx.AsyncClient, body: dict[str, Any], status: int) -> None:
    """Once the gateway has heard what makes it so."""
    async with asyncio.timeout(10):
        while True:
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code == status:
                return
            await asyncio.sleep(0.05)


async def _away() -> None:
    raise Unavailable("the controller is away")
