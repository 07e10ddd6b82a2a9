"""``loraplex top``."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from loraplex.cli.top_view import overview, tables
from rich.console import Console
from typer.testing import Result

Run = Callable[..., Result]


def served(requests: int, good: int, ttft_s: float | None) -> dict[str, Any]:
    return {
        "requests": requests,
        "errors": 0,
        "good": good,
        "prompt_tokens": 0,
        "output_tokens": 0,
        "ttft_p50_s": ttft_s,
        "ttft_p99_s": ttft_s,
        "tpot_p50_s": None,
        "tpot_p99_s": None,
    }


def activity(gateway: str, tenants: dict[str, dict[str, Any]], queued: int = 0) -> dict[str, Any]:
    adapter = {"tenant": "acme", "name": "pirate", "base_model": "b", "digest": "d1"}
    total = served(sum(t["requests"] for t in tenants.values()), sum(t["good"] for t in tenants.values()), 0.1)
    return {
        "gateway": gateway,
        "queued": queued,
        "window_s": 60.0,
        "total": total,
        "tenants": [{"tenant": name, "served": part} for name, part in tenants.items()],
        "adapters": [{**adapter, "served": served(3, 3, 0.1)}],
    }


def replica(name: str, group: str, tokens: int, *resident: str, **changes: Any) -> dict[str, Any]:
    load = {
        "num_running": 2,
        "num_waiting": 1,
        "num_queued_tokens": 30,
        "num_free_pages": 400,
        "steps": tokens // 2,
        "generated_tokens": tokens,
        "resident_adapters": list(resident),
    }
    described = {"id": name, "base_model": "b", "group": group, "shape": {"tp": 2, "pp": 1}, "gpu": "h100-80gb"}
    return {**described, "draining": False, "connected": True, "num_planned_adapters": 1, "load": load, **changes}


def status(*replicas: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": 1, "version": 7, "replicas": list(replicas)}


def test_gateways_are_joined_and_rates_come_from_two_looks() -> None:
    first = overview(status(replica("r1", "g1", 100, "d1")), [activity("gw-1", {"acme": served(1, 1, 0.1)})], None, 0.0)
    assert first["replicas"][0]["tokens_per_s"] is None
    seen = overview(
        status(
            replica("r1", "g1", 150, "d1", "d2"),
            replica("r0", "g0", 9, "d1", draining=True),
            replica("r2", "g2", 0, connected=False, load=None),
        ),
        [
            activity("gw-1", {"acme": served(3, 2, 0.1), "globex": served(1, 1, None)}, queued=2),
            activity("gw-2", {"acme": served(5, 5, 0.4)}, queued=1),
        ],
        first,
        2.0,
    )
    assert seen["queued"] == 3
    assert (seen["total"]["requests"], seen["total"]["attainment"]) == (9, pytest.approx(8 / 9))
    acme, globex = seen["tenants"]
    assert (acme["tenant"], acme["requests"], acme["attainment"], acme["ttft_p99_s"]) == ("acme", 8, 7 / 8, 0.4)
    assert globex["ttft_p50_s"] is None
    assert [(r["group"], r["state"]) for r in seen["replicas"]] == [("g0", "draining"), ("g1", "up"), ("g2", "away")]
    old = seen["replicas"][1]
    assert (old["tokens_per_s"], old["steps_per_s"], old["resident_adapters"]) == (25.0, 12.5, 2)
    assert seen["replicas"][0]["tokens_per_s"] is None, "it was not there before"
    (pirate,) = seen["adapters"]
    assert (pirate["requests"], pirate["num_resident"]) == (6, 2)

    console = Console(file=io.StringIO(), width=200)
    console.print(tables(seen, top=1, slo="ttft=500ms"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("9 requests in 60 s", "88.9%", "2x1 h100-80gb", "draining", "away", "acme/pirate", "3 wait"):
        assert words in text
    assert "globex" not in text


def test_a_replica_that_began_again_has_no_rate() -> None:
    first = overview(status(replica("r1", "g1", 100)), [activity("gw", {})], None, 0.0)
    again = overview(status(replica("r1", "g1", 10)), [activity("gw", {})], first, 1.0)
    assert again["replicas"][0]["tokens_per_s"] is None
    assert again["total"]["attainment"] is None


def test_top_of_a_running_platform(call: Run, run: Run, platform: Any) -> None:
    call("chat", "Hello", "--model", "pirate")
    seen = json.loads(call("top", "--once", "--json", "--interval", 0.1, "--slo", "ttft=30s").stdout)
    assert seen["total"]["attainment"] == 1.0
    assert [(adapter["tenant"], adapter["name"]) for adapter in seen["adapters"]] == [("acme", "pirate")]
    assert [replica["id"] for replica in seen["replicas"]] == ["fake-0"]
    text = call("top", "--once", "--interval", 0.1).stdout
    assert "acme/pirate" in text
    assert "fake-0" in text
    refused = run("top", "--once", "--url", platform.url, "--key", "lpx_acme_key_of_the_tests")
    assert refused.exit_code == 1
    assert "403" in refused.stderr


class Clock:
    """Ends the command at the fourth pause, as Ctrl-C does."""

    def __init__(self) -> None:
        self.pauses = 0

    def sleep(self, seconds: float) -> None:
        self.pauses += 1
        if self.pauses == 4:
            raise KeyboardInterrupt

    def monotonic(self) -> float:
        return float(self.pauses)


def test_the_live_view_ends_with_ctrl_c(call: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("loraplex.cli.top.time", clock)
    assert call("top").stdout.count("fake-0") == 3, "into a file: a look after each pause but the last"
    clock.pauses = 0
    assert call("top", "--json").stdout.count('"gateways"') == 3
    clock.pauses = 0
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    screen = call("top").stdout
    assert clock.pauses == 4
    assert "fake-0" in screen
    assert screen.startswith("\x1b[?1049h"), "on a screen of its own"
