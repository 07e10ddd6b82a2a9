"""`config check`: all problems at once, each with its path; warnings; where data will lie."""

import json
import os
from pathlib import Path

import pytest
from loraplex.cli.main import app
from loraplex.config.advice import notes, warnings
from loraplex.config.platform import parse_platform_config, read_config
from loraplex.core.errors import BadConfig
from typer.testing import CliRunner, Result

BROKEN = """
base_models: [{id: a, model: m, engine: {max_runing: 3, max_running: 0}}, {model: b, executor: {device: 3}}, 7]
listen: {http_port: eight}
serve: {gateway_resources: {a: b}}
gatway: {}
tenants: [{name: acme, limits: {requests: 1}}]
traces: {url: ""}
registry: {max_lora_rank: 0}
"""
PATHS = [
    "base_models[0].engine.max_runing",
    "base_models[0].engine.max_running",
    "base_models[1].executor.device",
    "base_models[1].id",
    "base_models[2]",
    "listen.http_port",
    "serve.gateway_resources[...]",
    "gatway",
    "tenants[0].limits.requests",
    "traces",
    "registry",
]
GOOD = "base_models: [{id: a, model: 'random:tiny-llama'}]\ntenants: [{name: acme}]\n"


def check(file: Path, text: str, *options: str) -> Result:
    file.write_text(text)
    return CliRunner().invoke(app, ["config", "check", str(file), *options])


def test_all_problems_are_found_each_with_its_path() -> None:
    config, problems = read_config(BROKEN)
    assert config is None
    assert [problem.path for problem in problems] == PATHS
    with pytest.raises(BadConfig, match=r"max_runing: there is no such key \(and 10 more: loraplex config check\)"):
        parse_platform_config(BROKEN, source="x.yaml")


def test_rules_between_parts_are_all_told() -> None:
    text = """
    base_models: [{id: a, model: m, replicas: -1, engine: {max_running: 300}}, {id: a, model: m, num_cpus: 0}]
    listen: {http_port: 8000, grpc_port: 8000}
    tenants: [{name: acme}, {name: acme}]
    demo: true
    """
    assert [problem.path for problem in read_config(text)[1]] == [
        "base_models[0].replicas",
        "base_models[0].engine.max_running",
        "base_models[1].id",
        "base_models[1]",
        "demo",
        "listen.grpc_port",
        "tenants[1].name",
    ]


def test_the_command_prints_a_line_for_each_and_fails(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    result = check(file, BROKEN)
    assert result.exit_code == 2
    assert [line.partition(": ")[2].partition(":")[0] for line in result.output.splitlines()] == PATHS
    as_json = check(file, BROKEN, "--json")
    assert [problem["path"] for problem in json.loads(as_json.stdout)["problems"]] == PATHS


def test_a_good_file_is_told_where_its_data_will_lie(tmp_path: Path) -> None:
    result = check(tmp_path / "fleet.yaml", GOOD + f"data_dir: {tmp_path}\n")
    assert result.exit_code == 0
    assert "warning" not in result.output
    assert f"traces are written to {tmp_path}/traces by the controller" in result.output
    assert result.output.splitlines()[-1] == "no problems"
    shared = parse_platform_config(
        GOOD + "registry: {artifact_url: 's3://b/a'}\ntraces: {url: 's3://b/t'}\n", source="x.yaml"
    )
    assert list(notes(shared)) == [
        "adapters are stored at s3://b/a, from where every node fetches them",
        "traces are written to s3://b/t by the controller, to which gateways send them",
    ]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("base_models: [{id: a, model: 'random:tiny-llama'}]\n", "tenants"),
        (GOOD + "ray: {address: auto}\n", "listen.host"),
        (GOOD + "data_dir: /dev/null/x\n", "data_dir"),
        (GOOD.replace("random:tiny-llama", "/no/such/model"), "base_models[0].model"),
        (GOOD.replace("llama'", "llama', executor: {device: cuda}"), "base_models[0].num_gpus"),
        (GOOD.replace("llama'", "llama', num_gpus: 1"), "base_models[0].executor.device"),
        (GOOD + "controller: {fleet: {mode: auto}}\n", "controller.fleet.planning.profiles"),
        (GOOD + "controller: {fleet: {planning: {profiles: [no-such]}}}\n", "controller.fleet.planning.profiles"),
        (
            GOOD + "controller: {fleet: {planning: {profiles: [h100-80gb]}}}\n",
            "controller.fleet.planning.profile_bases",
        ),
    ],
)
def test_what_is_allowed_and_may_surprise_is_a_warning(text: str, path: str) -> None:
    assert [problem.path for problem in warnings(parse_platform_config(text, source="x.yaml"))] == [path]


def test_low_ports_and_open_key_files_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    key = tmp_path / "admin.key"
    key.write_text("lpx_")
    key.chmod(0o644)
    config = parse_platform_config(GOOD + f"listen: {{http_port: 80}}\ndata_dir: {tmp_path}\n", source="x.yaml")
    assert [problem.path for problem in warnings(config)] == ["listen.http_port", "admin_key_file"]
    key.chmod(0o600)
    assert [problem.path for problem in warnings(config)] == ["listen.http_port"]
