"""/v1/plans, /v1/fleet and /v1/decisions over the ASGI transport; ``tests/cli/test_plan_live.py`` has whole lives."""

from typing import Any

import pytest
from loraplex.controller.fleet.state import FleetBase
from loraplex.core.fleet import NodeStatus
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.testing.fake_actuator import FakeActuator
from loraplex.testing.tiny_controller import TINY_BASE

ADMIN_KEY = "lpx_platform_admin_key_of_the_tests"
GROUP = {"name": "x", "shape": {"tp": 1, "pp": 1}, "bases": [{"base_model_id": TINY_BASE}]}
PATHS = (
    ("GET", "/v1/fleet", None),
    ("GET", "/v1/plans", None),
    ("GET", "/v1/plans/active", None),
    ("GET", "/v1/plans/1", None),
    ("GET", "/v1/decisions", None),
    ("POST", "/v1/plans", {"plan": {"version": 1, "groups": []}}),
    ("POST", "/v1/plans/rollback", {}),
    ("POST", "/v1/plans/1/accept", None),
)


@pytest.fixture
async def fleet(world: Any) -> FakeActuator:
    """One node with two GPUs, and one group."""
    machines = FakeActuator([NodeStatus(name="n1", gpu="g", num_gpus=2)])
    group = GroupPlan(name="first", shape=Shape(), bases=(BasePlacement(base_model_id=TINY_BASE),))
    manager = await world.control.controller.run_fleet(
        machines,
        loads=machines.load,
        bases={TINY_BASE: FleetBase(base_model_id=TINY_BASE)},
        default_plan=Plan(version=0, groups=(group,)),
    )
    await world.eventually(lambda: manager.status().settled)
    return machines


async def test_only_the_admin_role(world: Any, fleet: FakeActuator) -> None:
    for method, path, body in PATHS:
        assert (await world.http.request(method, path, json=body)).status_code == 403, path


async def test_without_replicas_of_its_own_the_controller_has_no_plans(world: Any) -> None:
    async with world.client(ADMIN_KEY) as admin:
        for method, path, body in PATHS:
            assert (await admin.request(method, path, json=body)).status_code == 503, path


async def test_a_plan_is_applied_and_found_again(world: Any, fleet: FakeActuator) -> None:
    async with world.client(ADMIN_KEY) as admin:
        made = await admin.post("/v1/plans", json={"plan": {"version": 1, "groups": [GROUP, {**GROUP, "name": "y"}]}})
        assert made.status_code == 201, made.text
        assert made.json()["state"] == "applying"
        await world.eventually(lambda: fleet.num_serving(TINY_BASE) == 2)
        groups = (await admin.get("/v1/fleet")).json()["groups"]
        assert [group["name"] for group in groups] == ["x", "y"]
        assert (await admin.get("/v1/plans/active")).json()["plan"] == made.json()["plan"]
        assert (await admin.get("/v1/plans/1")).json()["source"] == "admin"
        assert (await admin.get("/v1/plans/9")).status_code == 404
        assert (await admin.post("/v1/plans/1/accept")).status_code == 409
        assert (await admin.get("/v1/decisions")).json()["data"][-1]["kind"] == "applied"


async def test_bad_bodies(world: Any, fleet: FakeActuator) -> None:
    async with world.client(ADMIN_KEY) as admin:
        for plan in ({}, {"version": 1}, {"version": "x", "groups": []}, {"version": 1, "groups": [{"name": "x"}]}):
            refused = await admin.post("/v1/plans", json={"plan": plan})
            assert refused.status_code == 400, plan
            assert refused.json()["error"]["message"].startswith("not a plan: ")
        for body in ({}, {"plan": 3}, {"plan": {"version": 1, "groups": []}, "extra": 1}):
            assert (await admin.post("/v1/plans", json=body)).status_code == 400, body
        for version in (-1, "x", 1.5):
            assert (await admin.post("/v1/plans/rollback", json={"version": version})).status_code == 400, version
        assert (await admin.get("/v1/plans", params={"limit": 0})).status_code == 400
        assert (await admin.get("/v1/plans")).json()["data"] == []
