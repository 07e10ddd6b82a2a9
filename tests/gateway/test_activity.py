"""What a gateway remembers of the last minutes."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from loraplex.gateway.activity import MAX_WINDOW_S, Activity, Summary
from loraplex.traces.recorder import RecorderCounters
from loraplex.traces.row import ArrivalRow, TraceRow

ADMIN_KEY = "lpx_platform_admin_key_of_the_tests"


@dataclass
class Rows:
    rows: list[TraceRow] = field(default_factory=list)
    arrivals: list[ArrivalRow] = field(default_factory=list)

    @property
    def counters(self) -> RecorderCounters:
        return RecorderCounters(sent=len(self.rows))

    def arrived(self, row: ArrivalRow) -> None:
        self.arrivals.append(row)

    def record(self, row: TraceRow) -> None:
        self.rows.append(row)


@dataclass
class Clock:
    now_s: float = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


def row(tenant: str = "acme", adapter: str | None = None, **changes: Any) -> TraceRow:
    values: dict[str, Any] = {
        "arrival_s": 0.0,
        "tenant": tenant,
        "request_id": "r",
        "endpoint": "completions",
        "base_model_id": "base",
        "adapter_name": adapter,
        "adapter_digest": None if adapter is None else f"digest-{adapter}",
        "prompt_tokens": 10,
        "output_tokens": 5,
        "ttft_s": 0.1,
        "tpot_s": 0.01,
        "e2e_s": 0.2,
        "status": 200,
        "finish_reason": "length",
        "stream": True,
    }
    return TraceRow(**{**values, **changes})


def summary(activity: Activity, window_s: float = 60.0, *, ttft_s: float = 0.5, tpot_s: float = 0.05) -> Summary:
    return activity.summary(window_s=window_s, ttft_s=ttft_s, tpot_s=tpot_s, max_adapters=10)


def test_good_are_those_answered_within_all_targets() -> None:
    trace = Rows()
    activity = Activity(trace, Clock())
    rows = [
        row(),
        row(ttft_s=0.6),
        row(tpot_s=0.06),
        row(tpot_s=None, output_tokens=1),
        row(status=429, ttft_s=None, tpot_s=None, output_tokens=0),
        row(finish_reason="error"),
        row("globex", "lawyer"),
    ]
    for each in rows:
        activity.record(each)
    found = summary(activity)
    assert (found.total.requests, found.total.errors, found.total.good) == (7, 2, 3)
    assert found.total.output_tokens == 5 * 5 + 1
    assert (found.total.ttft_p50_s, found.total.ttft_p99_s) == (0.1, 0.6)
    assert list(found.tenants) == ["acme", "globex"]
    assert found.tenants["globex"].good == 1
    (adapter,) = found.adapters
    assert (adapter.tenant, adapter.name, adapter.digest) == ("globex", "lawyer", "digest-lawyer")
    assert summary(activity, ttft_s=math.inf, tpot_s=math.inf).total.good == 5
    assert trace.rows == rows
    assert activity.counters.sent == 7


def test_the_window_moves_on_and_rows_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    activity = Activity(Rows(), clock)
    assert summary(activity).total.ttft_p50_s is None
    clock.now_s += 20
    activity.record(row("early"))
    assert summary(activity).window_s == 20, "it has not been there for longer"
    clock.now_s += 100
    activity.record(row("late"))
    assert list(summary(activity).tenants) == ["late"]
    assert list(summary(activity, 1e9).tenants) == ["early", "late"]
    clock.now_s += MAX_WINDOW_S
    activity.record(row("last"))
    assert list(summary(activity, 1e9).tenants) == ["last", "late"]

    monkeypatch.setattr("loraplex.gateway.activity._MAX_ROWS", 3)
    clock = Clock()
    short = Activity(Rows(), clock)
    for _ in range(5):
        clock.now_s += 1
        short.record(row())
    found = summary(short)
    assert (found.total.requests, found.window_s) == (3, 2)


async def test_the_endpoint_tells_the_administrator(world: Any) -> None:
    world.says("Many tenants")
    body = {"model": "pirate", "prompt": "Ahoy", "max_tokens": 4}
    assert (await world.http.post("/v1/completions", json=body)).status_code == 200
    assert (await world.http.post("/v1/completions", json={**body, "model": "nosuch"})).status_code == 404
    async with world.client(ADMIN_KEY) as admin:
        found = (await admin.get("/v1/activity", params={"ttft_s": 30, "max_adapters": 5})).json()
        assert (found["gateway"], found["queued"]) == ("gw-1", 0)
        assert found["total"]["requests"] == 2
        assert found["total"]["good"] == 1
        assert [(a["tenant"], a["name"], len(a["digest"])) for a in found["adapters"]] == [("acme", "pirate", 64)]
        strict = (await admin.get("/v1/activity", params={"ttft_s": 1e-9})).json()
        assert strict["total"]["good"] == 0
        for wrong in ({"window_s": 0}, {"window_s": 1e6}, {"ttft_s": -1}, {"tpot_s": "nan"}, {"max_adapters": -1}):
            assert (await admin.get("/v1/activity", params=wrong)).status_code == 400, wrong
    assert len(world.tracer.rows) == 2
