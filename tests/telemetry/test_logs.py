"""Logs carry request ids and never keys."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from loraplex.telemetry.config import LogConfig
from loraplex.telemetry.logs import configure_logging, redact, request_id_var


@pytest.fixture
def restored_loggers() -> Iterator[None]:
    names = ("loraplex", "loraplex_deployments")
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    yield
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).propagate = propagate


@pytest.mark.parametrize("text", ["key lpx_abcDEF-123_x", "authorization: Bearer abc.def", "BEARER lpx_0123456789"])
def test_redaction(text: str) -> None:
    assert "[redacted]" in redact(text)
    assert "abc" not in redact(text)
    assert "0123" not in redact(text)


@pytest.mark.usefixtures("restored_loggers")
def test_json_lines() -> None:
    stream = io.StringIO()
    configure_logging(LogConfig(json=True), stream=stream)
    configure_logging(LogConfig(json=True), stream=stream)
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
    configure_logging(LogConfig(level="WARNING"), stream=stream)
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
