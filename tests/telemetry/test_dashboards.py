"""The chart's dashboards are those of the source; every query is PromQL over metrics that a platform exposes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from loraplex.telemetry import catalogue
from loraplex.telemetry.catalogue import CATALOGUE
from loraplex.telemetry.dashboards import DASHBOARDS, write
from loraplex.telemetry.grafana import Dashboard

from tests.telemetry.conftest import ACME_KEY, Platform
from tests.telemetry.promtool import promtool

FOLDER = Path(__file__).parents[2] / "helm" / "loraplex" / "dashboards"
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


async def test_a_running_platform_has_all_that_they_show(platform: Platform) -> None:
    async with platform.client(ACME_KEY) as client:
        body = {"model": "pirate", "prompt": "Many tenants share one base model.", "max_tokens": 4}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    text = await platform.metrics_with("loraplex_trace_store_rows{", "loraplex_fleet_attainment_ratio ")
    announced = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    sampled = set(re.findall(r"^(\w+)[{ ]", text, re.MULTILINE))
    # A platform that fails at nothing and plans nothing has no values of these.
    later = (
        catalogue.CONTROL_ERRORS,
        catalogue.REFUSED,
        catalogue.PLANNER_DECISIONS,
        catalogue.PLANNER_ATTAINMENT,
        catalogue.PLANNER_GAIN,
    )
    for dashboard in DASHBOARDS:
        for name in {name for query in queries(dashboard) for name in names(query)}:
            assert SERIES[name].name in announced
            assert name in sampled or SERIES[name] in later, name
