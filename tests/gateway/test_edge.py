"""Keys, tenants' paths, request ids, limits and the error object, whatever the route."""

from dataclasses import replace
from typing import Any

import pytest
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.gateway.directory import Directory

ACME_KEY, GLOBEX_KEY, ADMIN_KEY = (
    "lpx_acme_admin_key_of_the_tests",
    "lpx_globex_admin_key_of_the_tests",
    "lpx_platform_admin_key_of_the_tests",
)
CHAT = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}


def check_error(reply: Any, status: int, code: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert reply.headers["x-request-id"]


async def test_keys(world: Any) -> None:
    async with world.client(None) as client:
        check_error(await client.get("/v1/models"), 401, "missing_api_key")
        check_error(await client.get("/v1/models", headers={"authorization": "Bearer nope"}), 401, "invalid_api_key")
        check_error(await client.get("/v1/models", headers={"authorization": "Basic eA=="}), 401, "missing_api_key")
        assert (await client.get("/v1/models", headers={"x-api-key": ACME_KEY})).status_code == 200
        reply = await client.get("/v1/models")
        assert reply.headers["www-authenticate"] == "Bearer"


async def test_deleted_key_stops_working(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        keys = (await admin.get("/v1/tenants/globex/keys")).json()["data"]
        assert (await admin.delete(f"/v1/tenants/globex/keys/{keys[0]['id']}")).status_code == 200
    async with world.client(GLOBEX_KEY) as client:
        check_error(await client.get("/v1/models"), 401, "invalid_api_key")


async def test_models_of_a_tenant(world: Any) -> None:
    data = (await world.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in data] == ["tiny-base", "pirate"]
    assert data[1]["parent"] == "tiny-base"
    for name in ("tiny-base", "pirate", "pirate@1", "pirate@2"):
        assert (await world.http.get(f"/v1/models/{name}")).json()["id"] == name


@pytest.mark.parametrize("name", ["pirate@3", "pirate@x", "pirate@", "@1", "pirate@-1", "pirate@1@1", "a/b", "\u0661"])
async def test_odd_model_names_are_unknown(world: Any, name: str) -> None:
    check_error(await world.http.get(f"/v1/models/{name}"), 404, "model_not_found")


async def test_a_base_does_not_take_the_place_of_an_adapter_of_its_name(world: Any) -> None:
    snapshot = world.gateway._view.directory.snapshot
    bases = (*snapshot.base_models, replace(snapshot.base_models[0], base_model_id=BaseModelId("pirate")))
    directory = Directory(replace(snapshot, base_models=bases))
    for key, is_base in ((ACME_KEY, False), (GLOBEX_KEY, True)):
        principal = directory.authenticate(key)
        assert (directory.resolve(principal, "pirate").adapter is None) is is_base
        assert [(m.adapter is None) for m in directory.models(principal) if m.model_id == "pirate"] == [is_base]


async def test_another_tenants_adapter_reads_like_none(world: Any) -> None:
    foreign = await world.http.post("/v1/chat/completions", json={**CHAT, "model": "lawyer"})
    check_error(foreign, 404, "model_not_found")
    unknown = await world.http.post("/v1/chat/completions", json={**CHAT, "model": "lawyEr"})
    assert foreign.text.replace("lawyer", "X") == unknown.text.replace("lawyEr", "X")
    check_error(await world.http.get("/v1/adapters/lawyer"), 404, "adapter_not_found")


async def test_tenant_path_must_agree_with_the_key(world: Any) -> None:
    assert (await world.http.get("/t/acme/v1/models")).status_code == 200
    assert (await world.http.post("/t/acme/v1/chat/completions", json=CHAT)).status_code == 200
    foreign = await world.http.get("/t/globex/v1/models")
    unknown = await world.http.get("/t/nobody/v1/models")
    check_error(foreign, 404, "tenant_not_found")
    assert foreign.text.replace("globex", "X") == unknown.text.replace("nobody", "X")


async def test_admin_acts_for_a_tenant_but_does_not_generate(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        names = [adapter["name"] for adapter in (await admin.get("/t/globex/v1/adapters")).json()["data"]]
        assert names == ["lawyer"]
        check_error(await admin.get("/v1/adapters"), 403, "permission_denied")
        check_error(await admin.get("/t/nobody/v1/adapters"), 404, "tenant_not_found")
        check_error(await admin.post("/t/acme/v1/chat/completions", json=CHAT), 403, "permission_denied")
        assert [m["id"] for m in (await admin.get("/v1/models")).json()["data"]] == ["tiny-base"]


async def test_request_ids(world: Any) -> None:
    kept = await world.http.get("/v1/models", headers={"x-request-id": "trace-7.a"})
    assert kept.headers["x-request-id"] == "trace-7.a"
    for odd in ("has space", "x" * 129, "semi;colon"):
        reply = await world.http.get("/v1/models", headers={"x-request-id": odd})
        assert reply.headers["x-request-id"] not in (odd, "")


async def test_unknown_routes_and_methods(world: Any) -> None:
    check_error(await world.http.get("/v1/nothing"), 404, "unknown_url")
    check_error(await world.http.get("/nothing"), 404, "unknown_url")
    check_error(await world.http.get("/v1/chat/completions"), 405, "method_not_allowed")
    check_error(await world.http.get("/t/acme/health"), 404, "unknown_url")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/adapters/pirate", "DELETE, GET"),
        ("/v1/adapters", "GET, POST"),
        ("/t/acme/v1/chat/completions", "POST"),
        ("/v1/plans/rollback", "POST"),
        ("/v1/plans/active", "GET"),
        ("/v1/plans/17", "GET"),
    ],
)
async def test_a_method_that_a_path_does_not_have_names_those_it_has(world: Any, path: str, allowed: str) -> None:
    wrong = await world.http.put(path)
    check_error(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == allowed


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b'{"model": "\xff"}', b"[1", b"", b"[]", b"null", b'{"a":' * 3000, b"9" * 5000]
)
async def test_broken_bodies(world: Any, content: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/adapters"):
        reply = await world.http.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 400, (path, reply.text)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "kind", "told"),
    [
        (b"{}", "text/plain", "'content-type: application/json'"),
        (b"{}", "application/x-www-form-urlencoded", "'content-type: application/json'"),  # curl -d, no header
        (b"{}", None, "'content-type: application/json'"),
        (b"[]", "application/json", "a JSON object"),
        (b"", "application/json", "no body"),
    ],
)
async def test_a_body_that_is_no_json_object_is_told_what_it_lacks(
    world: Any, content: bytes, kind: str | None, told: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    for path in ("/v1/chat/completions", "/v1/completions"):
        reply = await world.http.post(path, content=content, headers=headers)
        check_error(reply, 400, "invalid_body")
        assert told in reply.json()["error"]["message"]


async def test_body_limit(world: Any) -> None:
    big = b"x" * (8 * 1024 * 1024 + 1)
    headers = {"content-type": "application/json"}
    check_error(await world.http.post("/v1/completions", content=big, headers=headers), 413, "payload_too_large")

    async def chunked() -> Any:
        for _ in range(9):
            yield b"x" * (1024 * 1024)

    check_error(await world.http.post("/v1/completions", content=chunked(), headers=headers), 413, "payload_too_large")
    # Only uploads are streamed; every other route would hold the whole body in memory.
    form = {"content-type": "multipart/form-data; boundary=b"}
    for path in ("/v1/completions", "/t/acme/v1/chat/completions", "/v1/adapters/pirate/rollback"):
        check_error(await world.http.post(path, content=chunked(), headers=form), 413, "payload_too_large")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"audio": {"voice": "x"}},
    ],
)
async def test_unsupported_fields_are_named(world: Any, fields: dict[str, Any]) -> None:
    reply = await world.http.post("/v1/chat/completions", json={**CHAT, **fields})
    check_error(reply, 400, "unsupported_parameter")
    assert reply.json()["error"]["param"] == next(iter(fields))


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content"),
        ([{"role": "user", "content": "ok"}, {"role": "assistant", "content": "", "tool_calls": [{}]}], "messages.1"),
        ("hi", "messages"),
    ],
)
async def test_bad_messages_are_named(world: Any, messages: Any, param: str) -> None:
    reply = await world.http.post("/v1/chat/completions", json={"model": "pirate", "messages": messages})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith(param)


async def test_bugs_are_500_without_detail(world: Any) -> None:
    def broken(_request: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    world.dispatcher.script = broken
    reply = await world.http.post("/v1/chat/completions", json=CHAT)
    check_error(reply, 500, "internal_error")
    assert "secret" not in reply.text
    assert world.tracer.rows[-1].status == 500


async def test_a_misconfiguration_is_500_without_detail(world: Any) -> None:
    async def misconfigured(*_args: Any) -> Any:
        raise BadConfig("sqlite:////srv/secret/control.db is not a control database", param="database.url")

    world.control.set_current = misconfigured
    reply = await world.http.post("/v1/adapters/pirate/rollback", json={"version": 1})
    check_error(reply, 500, "internal_error")
    assert "secret" not in reply.text


async def test_system_routes(world: Any) -> None:
    async with world.client(None) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        await world.eventually(lambda: world.gateway.not_ready() is None)
        assert (await client.get("/ready")).json() == {"status": "ok"}
        await world.control.remove_route(ReplicaId("fake-0"))
        assert await world.gateway._view.wait_for(lambda d: not d.snapshot.routes, timeout_s=2)
        reply = await client.get("/ready")
        check_error(reply, 503, "not_ready")
        assert reply.headers["retry-after"]
        await world.http.post("/v1/chat/completions", json=CHAT)
        text = (await client.get("/metrics")).text
    assert 'loraplex_gateway_requests_total{endpoint="chat.completions",status="200"} 1.0' in text
    assert "acme" not in text
    async with world.client(ADMIN_KEY) as admin:
        told = (await admin.get("/metrics")).text
    assert 'loraplex_tenant_requests_total{outcome="ok",tenant="acme"} 1.0' in told
    assert "loraplex_gateway_running_requests 0.0" in text
    assert "lpx_" not in text
