"""Every alert is PromQL over the catalogue's metrics, fires when it should, and says what to do."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from loraplex.telemetry import alerts
from loraplex.telemetry.alerts import ALERTS
from loraplex.telemetry.catalogue import CATALOGUE

from tests.helm.rendered import CHART, NAME, ci_values, of_kind, render
from tests.telemetry.promtool import promtool

SERIES = {series for spec in CATALOGUE for series in spec.series_names}
MINE = f'namespace="ml", service="{NAME}-gateways"'


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    more = "".join(f', {label}="{value}"' for label, value in labels.items())
    return {"series": f"{name}{{{MINE}{more}}}", "values": values}


def latencies(name: str, *, slow: bool) -> list[dict[str, str]]:
    """Ten answers a minute within 60 s, all of them within 1 ms unless ``slow``."""
    bounds = {"0.001": "0+0x60" if slow else "0+10x60", "60.0": "0+10x60", "+Inf": "0+10x60"}
    return [series(f"{name}_bucket", values, le=bound, endpoint="completions") for bound, values in bounds.items()]


UP = series("loraplex_gateway_running_requests", "0x60")
REQUESTS = series("loraplex_gateway_requests_total", "0+100x60", status="200", endpoint="completions")
STEPS = series("loraplex_replica_steps_total", "0+100x60", replica="a")
HITS = series("loraplex_replica_adapter_hits_total", "0+10x60", replica="a")
# What makes each of them fire, and what leaves it silent.
CASES: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "LoraplexNoGateway": ([], [UP]),
    "LoraplexNoReplica": ([UP], [UP, STEPS]),
    "LoraplexErrors": (
        [REQUESTS, series("loraplex_gateway_requests_total", "0+2x60", status="503", endpoint="completions")],
        [REQUESTS, series("loraplex_gateway_requests_total", "0+9x60", status="429", endpoint="completions")],
    ),
    "LoraplexSlowFirstToken": (
        latencies("loraplex_gateway_ttft_seconds", slow=True),
        latencies("loraplex_gateway_ttft_seconds", slow=False),
    ),
    "LoraplexSlowTokens": (
        latencies("loraplex_gateway_tpot_seconds", slow=True),
        latencies("loraplex_gateway_tpot_seconds", slow=False),
    ),
    "LoraplexQueue": (
        [series("loraplex_gateway_queued_generations", "60x60", pod=pod) for pod in "ab"],
        [series("loraplex_gateway_queued_generations", "60x60", pod="a")],
    ),
    "LoraplexPreemptions": (
        [REQUESTS, series("loraplex_replica_preemptions_total", "0+6x60", replica="a")],
        # Two gateways tell of the same preemptions.
        [REQUESTS, *(series("loraplex_replica_preemptions_total", "0+4x60", replica="a", pod=pod) for pod in "ab")],
    ),
    "LoraplexAdaptersReloaded": (
        [HITS, series("loraplex_replica_adapter_loads_total", "0+6x60", replica="a")],
        [HITS, series("loraplex_replica_adapter_loads_total", "0+4x60", replica="a")],
    ),
    "LoraplexPlanNotSettled": (
        [series("loraplex_plan_settled", "0x60")],
        [series("loraplex_plan_settled", "0x20 1x5 0x35")],
    ),
    "LoraplexControllerHeldUp": (
        [series("loraplex_fleet_problem", "1x60")],
        [series("loraplex_fleet_problem", "0x60")],
    ),
    "LoraplexControllerAway": (
        [series("loraplex_gateway_control_errors_total", "0+1x60", call="snapshot")],
        [series("loraplex_gateway_control_errors_total", "7x60", call="snapshot")],
    ),
    "LoraplexEpochsDiffer": (
        [series("loraplex_snapshot_epoch", value, pod=pod) for pod, value in (("a", "3x60"), ("b", "4x60"))],
        [series("loraplex_snapshot_epoch", "4x60", pod=pod) for pod in "ab"],
    ),
    "LoraplexTracesLost": (
        [series("loraplex_trace_recorder_rows_total", "0+1x60", outcome="dropped")],
        [
            series("loraplex_trace_recorder_rows_total", "0+1x60", outcome="sent"),
            series("loraplex_trace_store_rows", "0+1x60", state="written"),
            series("loraplex_trace_store_rows", "7x60", state="dropped"),
        ],
    ),
}
FIRES_TOO = {
    # The gateways' rows arrive, and the controller cannot write them.
    "LoraplexTracesLost": [series("loraplex_trace_store_rows", "0+1x60", state="dropped")],
}


@pytest.fixture(scope="module")
def rules_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (rules,) = of_kind(render(ci_values("full")), "PrometheusRule")
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": rules["spec"]["groups"]}))
    return file


def test_the_charts_file_is_what_the_source_says() -> None:
    """After a change: python -m loraplex.telemetry.alerts helm/loraplex/alerts.yaml"""
    assert (CHART / "alerts.yaml").read_text() == alerts.rules()


def test_each_names_metrics_of_the_catalogue_and_says_what_to_do() -> None:
    for alert in ALERTS:
        assert set(re.findall(r"\bloraplex_\w+", alert.expression)) <= SERIES, alert.name
        assert alert.summary.endswith(".")
        assert alert.runbook.endswith(".")
        assert "\n" not in alert.runbook


def test_promtool_accepts_the_rendered_rules(rules_file: Path) -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", rules_file)


def test_each_fires_when_it_should_and_only_then(rules_file: Path) -> None:
    assert CASES.keys() == {alert.name for alert in ALERTS}
    tests: list[dict[str, Any]] = []
    for alert in ALERTS:
        cases = [*zip((True, False), CASES[alert.name], strict=True)]
        if alert.name in FIRES_TOO:
            cases.append((True, FIRES_TOO[alert.name]))
        for fires, given in cases:
            labels = {"severity": alert.severity}
            if alert.name in ("LoraplexNoGateway", "LoraplexNoReplica"):
                labels |= {"namespace": "ml", "service": f"{NAME}-gateways"}
            expected = {"exp_labels": labels, "exp_annotations": alert.rule()["annotations"]}
            tests.append(
                {
                    "interval": "1m",
                    "input_series": given,
                    "alert_rule_test": [
                        {"eval_time": "55m", "alertname": alert.name, "exp_alerts": [expected] if fires else []}
                    ],
                }
            )
    file = rules_file.with_name("tests.yaml")
    file.write_text(
        yaml.safe_dump({"rule_files": [rules_file.name], "evaluation_interval": "1m", "tests": tests}, sort_keys=False)
    )
    assert "SUCCESS" in promtool("test", "rules", file)
