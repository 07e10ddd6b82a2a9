"""Metrics have bounded labels and units in their names; logs carry request ids and never keys."""

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from loraplex.core.control import TraceStoreStatus
from loraplex.core.ids import ReplicaId
from loraplex.core.wire import LoadReport
from loraplex.telemetry.labels import LabelCap
from loraplex.telemetry.logs import configure_logging, redact, request_id_var
from loraplex.telemetry.metrics import GatewayMetrics


@pytest.fixture
def restored_loggers() -> Iterator[None]:
    names = ("loraplex", "loraplex_deployments")
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    yield
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).propagate = propagate


def finish(metrics: GatewayMetrics, tenant: str) -> None:
    metrics.started()
    metrics.finished(
        endpoint="completions",
        tenant=tenant,
        status=200,
        prompt_tokens=3,
        cached_tokens=1,
        output_tokens=2,
        ttft_s=0.1,
        tpot_s=0.01,
        e2e_s=0.2,
    )


def test_label_cap() -> None:
    cap = LabelCap(2)
    assert [cap(value) for value in ("a", "b", "c", "a", "c")] == ["a", "b", "other", "a", "other"]


def test_tenants_are_bounded_in_metrics() -> None:
    metrics = GatewayMetrics(max_tenants=2)
    for i in range(50):
        finish(metrics, f"tenant-{i}")
    text = metrics.render(per_tenant=True).decode()
    assert set(re.findall(r'tenant="([^"]*)"', text)) == {"tenant-0", "tenant-1", "other"}
    assert 'loraplex_gateway_tokens_total{kind="prompt",tenant="other"} 144.0' in text
    assert "loraplex_gateway_running_requests 0.0" in text


def test_every_name_is_ours_and_once() -> None:
    text = GatewayMetrics().render(per_tenant=True).decode()
    names = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert all(name.startswith("loraplex_") for name, _ in names)
    assert all(name.endswith("_seconds") for name, kind in names if kind == "histogram")
    assert len(names) == len(set(names))


def test_replicas_that_are_gone_disappear() -> None:
    metrics = GatewayMetrics()
    metrics.replica_loads({ReplicaId("a"): LoadReport(num_running=3), ReplicaId("b"): LoadReport()})
    assert 'loraplex_replica_num_running{replica="a"} 3.0' in metrics.render(per_tenant=True).decode()
    metrics.replica_loads({ReplicaId("b"): LoadReport()})
    text = metrics.render(per_tenant=True).decode()
    assert 'replica="a"' not in text
    assert 'loraplex_replica_num_running{replica="b"} 0.0' in text


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


@pytest.mark.parametrize("text", ["key lpx_abcDEF-123_x", "authorization: Bearer abc.def", "BEARER lpx_0123456789"])
def test_redaction(text: str) -> None:
    assert "[redacted]" in redact(text)
    assert "abc" not in redact(text)
    assert "0123" not in redact(text)


@pytest.mark.usefixtures("restored_loggers")
def test_json_lines() -> None:
    stream = io.StringIO()
    configure_logging(json=True, stream=stream)
    configure_logging(json=True, stream=stream)
    token = request_id_var.set("req-1")
    try:
        logging.getLogger("loraplex.gateway").info("key %s", "lpx_abcdefgh1234", extra={"tenant": "acme"})
    finally:
        request_id_var.reset(token)
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry["message"] == "key [redacted]"
    assert (entry["request_id"], entry["tenant"], entry["level"]) == ("req-1", "acme", "info")


@pytest.mark.usefixtures("restored_loggers")
def test_plain_lines_with_exceptions() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream, level="WARNING")
    logger = logging.getLogger("loraplex.test")
    logger.info("hidden")
    try:
        raise ValueError("Bearer topsecret")
    except ValueError:
        logger.exception("failed")
    text = stream.getvalue()
    assert "hidden" not in text
    assert "error loraplex.test: failed" in text
    assert "topsecret" not in text
