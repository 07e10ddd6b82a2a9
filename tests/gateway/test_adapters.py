"""/v1/adapters over the ASGI transport."""

from pathlib import Path
from typing import Any

import pytest
from loraplex.testing.tiny_adapter import tiny_adapter

MEMBER_KEY, GLOBEX_KEY, ADMIN_KEY = (
    "lpx_acme_member_key_of_the_tests",
    "lpx_globex_admin_key_of_the_tests",
    "lpx_platform_admin_key_of_the_tests",
)


def files(seed: int = 0, **shape: int) -> dict[str, Any]:
    return {name: (name, data, "application/octet-stream") for name, data in tiny_adapter(seed, **shape).items()}


async def test_upload_is_streamed_and_usable_at_once(world: Any) -> None:
    parts = files(lora_rank=256)
    world.control.calls.clear()
    reply = await world.http.post("/v1/adapters", data={"name": "poet"}, files=parts)
    assert reply.status_code == 201, reply.text
    data = reply.json()
    assert (data["id"], data["object"], data["version"], data["current"]) == ("poet", "adapter", 1, True)
    assert data["bytes"] == len(parts["adapter_model.safetensors"][1])
    sizes = [len(args[2]) for name, args in world.control.calls if name == "append_upload"]
    assert max(sizes) <= 16 * 1024
    assert len(sizes) == 4
    listed = (await world.http.get("/v1/models")).json()["data"]
    assert "poet" in [model["id"] for model in listed]
    body = {"model": "poet", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await world.http.post("/v1/chat/completions", json=body)).status_code == 200


async def test_files_may_be_known_by_file_name(world: Any) -> None:
    parts = [("files", value) for value in files().values()]
    reply = await world.http.post("/v1/adapters", data={"name": "poet"}, files=parts)
    assert reply.status_code == 201, reply.text


async def test_refused_uploads_leave_nothing(world: Any) -> None:
    cases: list[tuple[dict[str, Any], dict[str, str], str]] = [
        ({"adapter_config.json": files()["adapter_config.json"]}, {"name": "poet"}, "adapter_model.safetensors"),
        (files(), {}, "name"),
        (files(hidden_size=12), {"name": "poet"}, "adapter_model.safetensors"),
        ({**files(), "other.bin": ("other.bin", b"x")}, {"name": "poet"}, "file"),
    ]
    for parts, data, param in cases:
        reply = await world.http.post("/v1/adapters", data=data, files=parts)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == param
    assert not world.control.uploads()
    assert (await world.http.get("/v1/adapters/poet")).status_code == 404


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no boundary here"),
        ("multipart/form-data; boundary=b", b'--b\r\ncontent-disposition: form-data; name="name"\r\n\r\npoet'),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"a: b\r\n" * 3000),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=" + "b" * 300, b"x"),
        ("application/octet-stream", b"x"),
        ("application/json", b'{"name": "poet"}'),
    ],
)
async def test_malformed_registrations(world: Any, content_type: str, content: bytes) -> None:
    reply = await world.http.post("/v1/adapters", content=content, headers={"content-type": content_type})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert not world.control.uploads()


async def test_an_upload_that_the_server_dropped_is_503_not_404(world: Any) -> None:
    begin = world.control.controller.begin_upload

    async def begin_and_drop(tenant: Any, name: str) -> Any:
        upload_id = await begin(tenant, name)
        await world.control.abort_upload(upload_id)  # as a controller does that starts again
        return upload_id

    world.control.begin_upload = begin_and_drop
    reply = await world.http.post("/v1/adapters", data={"name": "poet"}, files=files())
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "upload_dropped")
    assert reply.headers["retry-after"]


async def test_register_url(world: Any, tmp_path: Path) -> None:
    directory = tmp_path / "approved" / "poet"
    directory.mkdir(parents=True)
    for name, data in tiny_adapter().items():
        (directory / name).write_bytes(data)
    good = await world.http.post("/v1/adapters", json={"name": "poet", "url": f"file://{directory}"})
    assert good.status_code == 201, good.text
    bad = await world.http.post("/v1/adapters", json={"name": "poet", "url": "file:///etc"})
    assert bad.status_code == 403


async def test_versions_roll_back_and_delete(world: Any) -> None:
    versions = (await world.http.get("/v1/adapters/pirate")).json()["data"]
    assert [(v["version"], v["current"]) for v in versions] == [(1, False), (2, True)]
    reply = await world.http.post("/v1/adapters/pirate/rollback", json={"version": 1})
    assert reply.json()["version"] == 1
    chat = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}
    await world.http.post("/v1/chat/completions", json=chat)
    assert world.dispatcher.requests[-1].adapter.version == 1
    assert (await world.http.post("/v1/adapters/pirate/rollback", json={"version": 9})).status_code == 404
    for bad in ({"version": "1"}, {"version": 0}, {}):
        assert (await world.http.post("/v1/adapters/pirate/rollback", json=bad)).status_code == 400
    assert (await world.http.delete("/v1/adapters/pirate?version=2")).json()["deleted"] is True
    assert [v["version"] for v in (await world.http.get("/v1/adapters/pirate")).json()["data"]] == [1]
    assert (await world.http.delete("/v1/adapters/pirate?version=x")).status_code == 400
    assert (await world.http.delete("/v1/adapters/pirate")).status_code == 200
    assert (await world.http.get("/v1/adapters/pirate")).status_code == 404
    assert (await world.http.delete("/v1/adapters/pirate")).status_code == 404


async def test_roles_and_tenants(world: Any) -> None:
    async with world.client(MEMBER_KEY) as member:
        assert [a["name"] for a in (await member.get("/v1/adapters")).json()["data"]] == ["pirate"]
        assert (await member.post("/v1/adapters", data={"name": "poet"}, files=files())).status_code == 403
        assert (await member.delete("/v1/adapters/pirate")).status_code == 403
    async with world.client(GLOBEX_KEY) as other:
        assert (await other.delete("/v1/adapters/pirate")).status_code == 404
        assert [a["name"] for a in (await other.get("/v1/adapters")).json()["data"]] == ["lawyer"]
    async with world.client(ADMIN_KEY) as admin:
        made = await admin.post("/t/globex/v1/adapters", data={"name": "clerk"}, files=files())
        assert made.status_code == 201
    async with world.client(GLOBEX_KEY) as other:
        assert "clerk" in [a["name"] for a in (await other.get("/v1/adapters")).json()["data"]]


async def test_controller_away_is_503(world: Any) -> None:
    world.control.away = True
    reply = await world.http.post("/v1/adapters", data={"name": "poet"}, files=files())
    assert reply.status_code == 503
    assert reply.headers["retry-after"]
    chat = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}
    assert (await world.http.post("/v1/chat/completions", json=chat)).status_code == 200
