"""/v1/tenants and /v1/status over the ASGI transport."""

from typing import Any

ADMIN_KEY = "lpx_platform_admin_key_of_the_tests"
NO_LIMITS = dict.fromkeys(
    (
        "requests_per_minute",
        "tokens_per_minute",
        "max_concurrent_requests",
        "max_adapters",
        "max_adapter_bytes",
        "weight",
    )
)


async def test_life_of_a_tenant(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        made = await admin.post("/v1/tenants", json={"name": "initech", "limits": {"requests_per_minute": 5}})
        assert made.status_code == 201, made.text
        assert made.json()["limits"] == {**NO_LIMITS, "requests_per_minute": 5}
        assert (await admin.post("/v1/tenants", json={"name": "initech"})).status_code == 409
        changed = await admin.patch("/v1/tenants/initech", json={"limits": {"max_adapters": 2}})
        assert changed.json()["limits"] == {**NO_LIMITS, "requests_per_minute": 5, "max_adapters": 2}
        lifted = await admin.patch("/v1/tenants/initech", json={"limits": {"requests_per_minute": None}})
        assert lifted.json()["limits"] == {**NO_LIMITS, "max_adapters": 2}
        names = [tenant["name"] for tenant in (await admin.get("/v1/tenants")).json()["data"]]
        assert names == ["acme", "globex", "initech", "operators"]
        key = (await admin.post("/v1/tenants/initech/keys", json={"role": "tenant_admin"})).json()
        async with world.client(key["key"]) as client:
            assert (await client.get("/v1/models")).status_code == 200
        listed = (await admin.get("/v1/tenants/initech/keys")).json()["data"]
        assert [entry["id"] for entry in listed] == [key["id"]]
        assert "key" not in listed[0]
        assert (await admin.delete(f"/v1/tenants/initech/keys/{key['id']}")).status_code == 200
        assert (await admin.delete(f"/v1/tenants/initech/keys/{key['id']}")).status_code == 404
        assert (await admin.get("/v1/tenants/initech/usage")).json()["requests"] == 0
        assert (await admin.delete("/v1/tenants/initech")).status_code == 200
        assert (await admin.get("/v1/tenants/initech")).status_code == 404


async def test_requests_carry_the_weight_of_their_tenant(world: Any) -> None:
    body = {"model": "pirate", "prompt": "Ahoy", "max_tokens": 2}
    assert (await world.http.post("/v1/completions", json=body)).status_code == 200
    async with world.client(ADMIN_KEY) as admin:
        changed = await admin.patch("/v1/tenants/acme", json={"limits": {"weight": 4}})
        assert changed.json()["limits"] == {**NO_LIMITS, "weight": 4}
    assert (await world.http.post("/v1/completions", json=body)).status_code == 200
    assert [request.weight for request in world.dispatcher.requests] == [1.0, 4.0]


async def test_only_the_admin_role(world: Any) -> None:
    for method, path in (
        ("GET", "/v1/tenants"),
        ("POST", "/v1/tenants"),
        ("DELETE", "/v1/tenants/globex"),
        ("GET", "/v1/tenants/acme/usage"),
        ("GET", "/v1/status"),
        ("GET", "/v1/activity"),
    ):
        reply = await world.http.request(method, path, json={"name": "x"} if method == "POST" else None)
        assert reply.status_code == 403, (method, path)


async def test_bad_bodies(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        for body in (
            {},
            {"name": ""},
            {"name": "../x"},
            {"name": 3},
            {"name": "a", "limits": {"requests_per_minute": -1}},
            {"name": "a", "limits": {"unknown": 1}},
            {"name": "a", "limits": {"weight": 0}},
            {"name": "a", "limits": {"weight": 1.5}},
            {"name": "a", "extra": 1},
        ):
            assert (await admin.post("/v1/tenants", json=body)).status_code == 400, body
        assert (await admin.post("/v1/tenants/acme/keys", json={"role": "king"})).status_code == 400


async def test_status(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        status = (await admin.get("/v1/status")).json()
    assert status["gateway"] == "gw-1"
    assert status["num_tenants"] == 3
    assert (status["num_adapters"], status["num_adapter_versions"]) == (2, 3)
    assert status["replicas"] == [
        {
            "id": "fake-0",
            "base_model": "tiny-base",
            "address": "127.0.0.1:1",
            "group": "",
            "shape": {"tp": 1, "pp": 1},
            "gpu": "",
            "draining": False,
            "num_planned_adapters": 0,
            "connected": True,
            "load": None,
        }
    ]


async def test_limits_hold_through_the_lease(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        await admin.post("/v1/tenants", json={"name": "initech", "limits": {"requests_per_minute": 2}})
        key = (await admin.post("/v1/tenants/initech/keys", json={})).json()["key"]
    async with world.client(key) as client:
        statuses = [
            (await client.post("/v1/completions", json={"model": "tiny-base", "prompt": "Hi"})).status_code
            for _ in range(4)
        ]
    assert statuses == [200, 200, 429, 429]


async def test_usage_is_reported_and_a_deleted_tenants_key_is_unknown(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        await admin.post("/v1/tenants", json={"name": "initech"})
        key = (await admin.post("/v1/tenants/initech/keys", json={})).json()["key"]
        async with world.client(key) as client:
            assert (
                await client.post("/v1/completions", json={"model": "tiny-base", "prompt": "Hi"})
            ).status_code == 200
        used = len(world.codec.encode("Hi")) + len(world.codec.encode("Hello there."))
        await world.eventually_async(lambda: _used_tokens(admin), used)
        assert (await admin.delete("/v1/tenants/initech")).status_code == 200
        async with world.client(key) as client:
            assert (await client.get("/v1/models")).status_code == 401


async def _used_tokens(admin: Any) -> int:
    usage = (await admin.get("/v1/tenants/initech/usage")).json()
    return int(usage["prompt_tokens"] + usage["output_tokens"])
