"""Every command against the real gateway."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loraplex.testing.tiny_adapter import tiny_adapter
from typer.testing import Result

ANSWER = "Many tenants share one base model."
ACME_KEY, ADMIN_KEY = "lpx_acme_key_of_the_tests", "lpx_admin_key_of_the_tests"
Run = Callable[..., Result]


def _json(result: Result) -> Any:
    return json.loads(result.stdout)


def _write_adapter(directory: Path, *, seed: int) -> None:
    for name, data in tiny_adapter(seed).items():
        (directory / name).write_bytes(data)


@pytest.fixture
def peft_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "peft"
    directory.mkdir()
    _write_adapter(directory, seed=11)
    return directory


def test_status(call: Run) -> None:
    text = call("status").stdout
    assert "tiny-base" in text
    assert "2 adapters (3 versions)" in text
    assert "fake-0" in text
    assert _json(call("status", "--json"))["base_models"] == ["tiny-base"]


def test_tenant_life(call: Run) -> None:
    created = _json(call("tenant", "create", "initech", "--limit", "requests_per_minute=60", "--json"))
    assert created["limits"]["requests_per_minute"] == 60
    assert created["limits"]["max_adapters"] is None
    assert {tenant["name"] for tenant in _json(call("tenant", "list", "--json"))} >= {"acme", "globex", "initech"}
    assert "initech" in call("tenant", "list").stdout
    updated = _json(
        call(
            "tenant", "update", "initech", "--limit", "max_adapters=5", "--limit", "requests_per_minute=none", "--json"
        )
    )
    assert updated["limits"] == {**created["limits"], "requests_per_minute": None, "max_adapters": 5}
    shown = call("tenant", "show", "initech").stdout
    assert "max_adapters: 5" in shown
    assert "weight: 1" in shown
    assert _json(call("tenant", "update", "initech", "--limit", "weight=4", "--json"))["limits"]["weight"] == 4
    assert "output tokens: 0" in call("tenant", "usage", "initech").stdout
    call("tenant", "delete", "initech", "--yes")
    assert "initech" not in call("tenant", "list").stdout


def test_delete_asks_first(call: Run, run: Run, platform: Any) -> None:
    refused = run("tenant", "delete", "acme", "--demo-file", platform.key_file, input="n\n")
    assert refused.exit_code == 1
    assert "acme" in call("tenant", "list").stdout


def test_key_life(call: Run, run: Run, platform: Any) -> None:
    created = call("key", "create", "acme", "--role", "tenant_admin")
    secret = created.stdout.strip()
    assert " " not in secret
    listed = _json(call("key", "list", "acme", "--json"))
    assert all("key" not in key for key in listed)
    newest = next(key for key in listed if key["id"] in created.stderr)
    assert newest["role"] == "tenant_admin"
    assert run("adapter", "list", "--url", platform.url, "--key", secret).exit_code == 0
    call("key", "delete", "acme", newest["id"])
    assert newest["id"] not in call("key", "list", "acme").stdout
    refused = run("adapter", "list", "--url", platform.url, "--key", secret)
    assert refused.exit_code == 1
    assert "401" in refused.stderr


def test_adapter_life(call: Run, peft_dir: Path) -> None:
    first = _json(call("adapter", "register", "poet", peft_dir, "--json"))
    assert (first["name"], first["version"], first["current"]) == ("poet", 1, True)
    _write_adapter(peft_dir, seed=12)
    assert "version 2" in call("adapter", "register", "poet", peft_dir).stdout
    versions = _json(call("adapter", "show", "poet", "--json"))
    assert sorted((v["version"], v["current"]) for v in versions) == [(1, False), (2, True)]
    assert "version 1" in call("adapter", "rollback", "poet", 1).stdout
    call("adapter", "delete", "poet", "--version", 2, "--yes")
    assert len(_json(call("adapter", "show", "poet", "--json"))) == 1
    assert "poet" in call("adapter", "list").stdout
    call("adapter", "delete", "poet", "--yes")
    assert "poet" not in call("adapter", "list").stdout


def test_adapter_of_another_tenant(call: Run, run: Run, platform: Any) -> None:
    assert [a["name"] for a in _json(call("adapter", "list", "--tenant", "globex", "--json"))] == ["lawyer"]
    names = run("adapter", "list", "--tenant", "globex", "--url", platform.url, "--key", ADMIN_KEY, "--json")
    assert [a["name"] for a in _json(names)] == ["lawyer"]
    foreign = run("adapter", "list", "--tenant", "globex", "--url", platform.url, "--key", ACME_KEY)
    assert foreign.exit_code == 1


def test_register_says_what_is_missing(run: Run, platform: Any, tmp_path: Path) -> None:
    result = run("adapter", "register", "poet", tmp_path, "--demo-file", platform.key_file)
    assert result.exit_code == 2
    assert "adapter_config.json" in result.stderr
    assert run("adapter", "register", "poet", "--demo-file", platform.key_file).exit_code == 2


def test_chat_one_message(call: Run, platform: Any) -> None:
    assert call("chat", "Hello", "--model", "pirate", "--seed", 3, "--temperature", 0).stdout == ANSWER + "\n"
    request = platform.requests[-1]
    assert request.adapter is not None
    assert (request.adapter.name, request.sampling.seed, request.sampling.temperature) == ("pirate", 3, 0.0)
    assert call("chat", input="from a pipe").stdout == ANSWER + "\n"
    assert platform.requests[-1].adapter is None


def test_chat_unknown_model(run: Run, platform: Any) -> None:
    result = run("chat", "Hello", "--model", "lawyer", "--demo-file", platform.key_file)
    assert result.exit_code == 1
    assert "lawyer" in result.stderr
    assert "404" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_conversation(call: Run, platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.cli.chat._is_terminal", lambda: True)
    lines = ["Hello", "", "/models", "/model nosuch", "/model pirate", "And again", "/new", "Once more", "/what", ""]
    result = call("chat", "--system", "Be brief.", input="\n".join(lines))
    assert result.stdout.count(ANSWER) == 3
    assert "pirate" in result.stdout
    assert "no model nosuch" in result.stderr
    lengths = [len(request.prompt_token_ids) for request in platform.requests]
    assert lengths[1] > lengths[0]
    assert lengths[2] < lengths[1]
    assert [request.adapter is not None for request in platform.requests] == [False, True, True]


def test_replay(call: Run, platform: Any, tmp_path: Path) -> None:
    trace = Path(__file__).parent / "data" / "lmsys_arena_200.parquet"
    out = tmp_path / "report.json"
    result = call(
        "replay", trace, "--speed", 20, "--duration", 2, "--max-prompt-tokens", 100, "--max-output-tokens", 5,
        "--tokenizer", platform.tokenizer, "--out", out, "--json",
    )  # fmt: skip
    report = _json(result)
    assert report["requests"] == len(platform.requests) > 50
    assert report["errors"] == {}
    assert report["completed"] == report["requests"]
    assert report["output_tokens"] == sum(request.sampling.max_tokens for request in platform.requests)
    assert report["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in platform.requests)
    assert report["ttft_s"]["p50"] <= report["e2e_s"]["p50"] < 2.0
    assert {entry["tenant"] for entry in report["assignments"]} == {"acme", "globex"}
    assert {(t["tenant"], t["model"]) for t in report["targets"]} == {
        ("acme", "tiny-base"), ("acme", "pirate"), ("globex", "tiny-base"), ("globex", "lawyer"),
    }  # fmt: skip
    assert json.loads(out.read_text()) == report


def test_replay_against_targets_and_a_simulation(call: Run, run: Run, platform: Any, tmp_path: Path) -> None:
    trace = Path(__file__).parent / "data" / "lmsys_arena_200.parquet"
    plan, fleet, page = tmp_path / "plan.yaml", tmp_path / "fleet.yaml", tmp_path / "report.html"
    group = "{name: g0, shape: {tp: 1, pp: 1}, gpu: h100-80gb, bases: [{base_model_id: tiny-base}]}"
    plan.write_text(f"version: 1\ngroups: [{group}]\n")
    fleet.write_text(
        "profiles: [h100-80gb]\nnodes: [{name: n, gpu: h100-80gb, gpus: 1}]\nbases: {tiny-base: llama3-8b}\n"
    )
    load = (trace, "--speed", 20, "--duration", 2, "--max-prompt-tokens", 100, "--max-output-tokens", 5)
    load = (*load, "--tokenizer", platform.tokenizer, "--slo", "ttft=10s,tpot=10ms")
    result = _json(call("replay", *load, "--against-simulation", plan, "--fleet", fleet, "--report", page, "--json"))
    assert result["slo"]["ttft_attainment"] == 1.0
    assert sum(tenant["requests"] for tenant in result["tenants"]) == result["requests"]
    simulated = result["simulated"]
    assert simulated["attainment"]["measured"] == result["slo"]["attainment"]
    assert 0.005 < simulated["tpot_p50_s"]["predicted"] < 0.02
    text = page.read_text()
    assert "Predicted and measured" in text
    assert "globex" in text
    words = call("replay", *load, "--against-simulation", plan, "--fleet", fleet, "--simulator", "fast").stdout
    assert "SLO attainment" in words
    assert "points" in words

    sent = len(platform.requests)
    plan.write_text(plan.read_text().replace("h100-80gb", "b200"))
    for options in (
        ("--against-simulation", plan, "--fleet", fleet),
        ("--against-simulation", plan),
        ("--slo", "ttft=fast"),
        ("--report", tmp_path / "no" / "page.html"),
    ):
        failed = run("replay", trace, *options, "--demo-file", platform.key_file)
        assert failed.exit_code in (1, 2)
        assert len(failed.stderr.splitlines()) == 1, failed.stderr
    assert len(platform.requests) == sent, "nothing is sent when the options are wrong"


def test_replay_says_when_prompts_were_longer_than_asked_for(call: Run) -> None:
    trace = Path(__file__).parent / "data" / "lmsys_arena_200.parquet"
    result = call("replay", trace, "--speed", 50, "--requests", 10, "--max-prompt-tokens", 50, "--max-output-tokens", 2)
    assert "times the prompt tokens that were asked for" in result.stderr


def test_replay_text_output(call: Run) -> None:
    trace = Path(__file__).parent / "data" / "lmsys_arena_200.parquet"
    result = call("replay", trace, "--speed", 50, "--requests", 20, "--max-output-tokens", 3, "-m", "pirate")
    assert "20 of 20 requests" in result.stdout
    assert "send lag" in result.stdout
    assert "adapters are not among the models to ask, others stand for them: acme/pirate for " in result.stderr


def test_bench_serve_against_a_running_platform(call: Run, run: Run, platform: Any) -> None:
    options = ("--requests", 12, "--streams", 4, "--clients", 2, "--rounds", 1, "--input", 20, "--output", 7)
    result = _json(call("bench", "serve", *options, "--tokenizer", platform.tokenizer, "--json"))
    turn = result["rounds"][0]["http"]
    report = turn["report"]
    assert (report["completed"], report["output_tokens"], report["prompt_tokens"]) == (12, 84, 240)
    assert {(target["tenant"], target["model"], target["requests"]) for target in report["targets"]} == {
        ("acme", "tiny-base", 3), ("acme", "pirate", 3), ("globex", "tiny-base", 3), ("globex", "lawyer", 3),
    }  # fmt: skip
    assert turn["client_processes"] == 2
    assert list(turn["cpu"]) == ["client"]
    assert result["summary"]["http_tokens_per_s"] == report["output_tokens_per_s"]
    assert result["summary"]["http_over_engine"] is None
    chat = run(
        "bench",
        "serve",
        *options,
        "--http",
        platform.url,
        "--key",
        ACME_KEY,
        "--ask",
        "pirate",
        "--endpoint",
        "chat",
    )
    assert chat.exit_code == 0, chat.output
    assert "12 requests over 4 streams" in chat.stdout
    assert all(request.adapter is not None for request in platform.requests[-12:])


def test_bench_serve_beside_an_engine_of_the_same_model(call: Run, platform: Any) -> None:
    options = ("--requests", 4, "--streams", 2, "--rounds", 2, "--input", 40, "--output", 3, "--single-ttft", 2)
    model = ("--model", "random:tiny-llama", "--num-pages", 50, "--threads", 1)
    server = ("--http", platform.url, "--ask", "pirate", "--tokenizer", platform.tokenizer)
    result = _json(call("bench", "serve", *options, *model, *server, "--json"))
    ratios = [
        one["http"]["report"]["output_tokens_per_s"] / one["engine"]["output_tokens_per_s"] for one in result["rounds"]
    ]
    summary = result["summary"]
    assert summary["http_over_engine"] == pytest.approx(sum(ratios) / 2)
    for one in result["rounds"]:
        assert one["engine"]["output_tokens"] == one["http"]["report"]["output_tokens"] == 12
        assert one["single_engine"]["output_tokens"] == one["single_http"]["output_tokens"] == 2
    for table in (summary["ttft_ms"], summary["tpot_ms"], summary["single_ttft_ms"]):
        assert list(table) == ["p50", "p90", "p99"]
        assert all(value["engine"] > 0 for value in table.values())
    sent = [request.prompt_token_ids for request in platform.requests if len(request.prompt_token_ids) == 40]
    assert len(sent) == len(set(sent)) == 3 * (2 + 4 + 2), (
        "warm-up, load and lone requests, no prompt twice; a first turn that does not count"
    )


def test_bench_serve_without_an_answer_fails(run: Run, platform: Any) -> None:
    result = run(
        "bench",
        "serve",
        "--streams",
        3,
        "--rounds",
        1,
        "--http",
        platform.url,
        "--key",
        ACME_KEY,
        "--ask",
        "nosuch",
        "--json",
    )
    assert result.exit_code == 1
    assert _json(result)["summary"]["errors"] == {"404": 3}
    assert "nosuch" in result.stderr


def test_a_tenants_name_cannot_lead_to_another_path(run: Run, platform: Any) -> None:
    odd = run("adapter", "list", "--tenant", "acme/v1/models?", "--url", platform.url, "--key", ACME_KEY)
    assert odd.exit_code == 1
    assert "404" in odd.stderr
