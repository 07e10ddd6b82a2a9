"""Logs carry request ids and never keys."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from loraplex.core.errors import LoraplexError
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.telemetry.config import LogConfig
from loraplex.telemetry.logs import configure_logging, redact, request_id_var

from tests.gateway.conftest import ProxyContext
from tests.telemetry.conftest import ACME_KEY, ADMIN_KEY, GLOBEX_KEY, Platform


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


PROMPT = "Ferdinand keeps seventeen otters"
UNKNOWN_KEY = "lpx_nobody_has_this_key_in_the_tests"


async def make_everything_happen(platform: Platform) -> str:
    """Requests that end well, that are refused, that fail, and changes by the administrator; returns a new key."""
    completion = {"model": "pirate", "prompt": PROMPT, "max_tokens": 4}
    chat = {"model": "tiny-base", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
    async with platform.client(ACME_KEY) as client, platform.client(ADMIN_KEY) as admin:
        ids = {"x-request-id": "the-id-of-the-first"}
        assert (await client.post("/v1/completions", json=completion, headers=ids)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=chat | {"stream": True})).status_code == 200
        assert (await client.post("/v1/completions", json=completion | {"model": PROMPT})).status_code == 404
        assert (await client.post("/v1/completions", json=completion | {"max_tokens": PROMPT})).status_code == 400
        assert (await client.post("/v1/completions", json=completion | {"prompt": 99 * PROMPT})).status_code == 400
        assert (await client.post("/v1/completions", content=PROMPT)).status_code == 400
        for header in ({"authorization": f"Bearer {UNKNOWN_KEY}"}, {"authorization": "", "x-api-key": UNKNOWN_KEY}):
            assert (await client.post("/v1/completions", json=completion, headers=header)).status_code == 401
        made = await admin.post("/v1/tenants/acme/keys", json={"role": "member"})
        assert made.status_code == 201
        files = {"adapter_config.json": PROMPT.encode(), "adapter_model.safetensors": PROMPT.encode()}
        upload = {"name": (None, "broken"), **{name: (name, data) for name, data in files.items()}}
        assert (await client.post("/v1/adapters", files=upload)).status_code in (400, 422)
        (executor,) = platform.machines.executors
        executor.fails_once_in = "collect"
        failed = await client.post("/v1/completions", json=completion, headers={"x-request-id": "the-one-that-fails"})
        assert failed.status_code == 500
    context = ProxyContext([("authorization", f"Bearer {UNKNOWN_KEY}")])
    with pytest.raises(LoraplexError):
        [_ async for _ in platform.gateway.grpc_servicer.Generate(pb.GenerateRequest(text=PROMPT), context)]
    return str(made.json()["key"])


@pytest.mark.usefixtures("restored_loggers")
async def test_no_log_of_a_run_tells_prompts_or_keys(platform: Platform, caplog: pytest.LogCaptureFixture) -> None:
    """Ours as they are written, and those of all libraries, everything that there is."""
    stream = io.StringIO()
    configure_logging(LogConfig(level="DEBUG", json=True), stream=stream)
    with caplog.at_level(logging.DEBUG):
        new_key = await make_everything_happen(platform)
    ours = stream.getvalue()
    for secret in (
        *(PROMPT, "Ferdinand", "otters"),
        *(ACME_KEY, GLOBEX_KEY, ADMIN_KEY, UNKNOWN_KEY, new_key, "lpx_"),
        platform.controller.cluster_secret,
    ):
        assert secret not in ours
        assert secret not in caplog.text
    entries = [json.loads(line) for line in ours.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(entry) for entry in entries))
    ended = {entry["request_id"]: entry for entry in entries if " ended: " in entry["message"]}
    assert len(ended) >= 6
    first = ended["the-id-of-the-first"]
    assert first["message"] == "completions ended: 200"
    assert (first["tenant"], first["adapter"], first["output_tokens"]) == ("acme", "pirate", 4)
    assert ended["the-one-that-fails"]["message"] == "completions ended: 500"
    assert any(entry["logger"] == "loraplex.replica.driver" and "exception" in entry for entry in entries)
