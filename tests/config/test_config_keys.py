"""What `config explain` and `config schema` say, read from the structs."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from loraplex.cli.main import app
from loraplex.config.keys import keys
from loraplex.config.platform import read_config
from loraplex.config.schema import platform_schema
from typer.testing import CliRunner

FLEETS = sorted((Path(__file__).parents[2] / "cluster-configs" / "fleets").glob("*.yaml"))


def test_every_key_has_a_meaning_and_a_type() -> None:
    found = keys()
    assert len(found) > 150
    assert [key.path for key in found if not key.doc] == []
    assert len({key.path for key in found}) == len(found)
    assert [key.path for key in found if "None" in key.doc] == [], "YAML says null"


def test_one_key_with_default_unit_bounds_and_text() -> None:
    (key,) = keys("router.ttft_patience")
    assert (key.type, key.default, key.unit) == ("number >= 1", "2.0", "")
    (key,) = keys("base_models.engine.overdue_s")
    assert (key.path, key.unit) == ("base_models[].engine.overdue_s", "seconds")
    assert keys("base_models[3].engine.overdue_s") == (key,)
    (key,) = keys("base_models.id")
    assert (key.default, key.doc) == ("", "What clients write as `model`.")
    (key,) = keys("tenants.limits.max_adapter_bytes")
    assert (key.type, key.default, key.unit) == ("integer or null", "null", "bytes")


def test_a_section_is_all_its_keys_and_no_neighbour() -> None:
    found = {key.path for key in keys("controller.fleet.planning")}
    assert {"controller.fleet.planning", "controller.fleet.planning.profiles"} <= found
    assert all(path.startswith("controller.fleet.planning") for path in found)
    assert keys("controller.fleet.plan") == ()


@pytest.mark.parametrize("file", FLEETS, ids=lambda file: file.name)
def test_the_schema_takes_every_shipped_fleet(file: Path) -> None:
    jsonschema.Draft202012Validator(platform_schema()).validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "base_models: [{id: a, model: m, engine: {max_runing: 1}}]",
        "base_models: [{id: a, model: m, engine: {max_running: 0}}]",
        "{base_models: [{id: a, model: m}], serve: {proxy: nginx}}",
        "{base_models: [{id: a, model: m}], gatway: {}}",
        "{base_models: [{id: a, model: m}], tenants: [{name: acme, limits: {requests: 1}}]}",
    ],
)
def test_what_the_schema_refuses_the_platform_refuses_too(text: str) -> None:
    schema = jsonschema.Draft202012Validator(platform_schema())
    assert list(schema.iter_errors(yaml.safe_load(text)))
    assert read_config(text)[0] is None


def test_the_schema_describes_what_explain_describes() -> None:
    defs = platform_schema()["$defs"]
    (key,) = keys("listen.host")
    assert defs["ListenConfig"]["properties"]["host"]["description"] == key.doc


def test_the_commands_print_them() -> None:
    run = CliRunner().invoke
    one = run(app, ["config", "explain", "router.resume_timeout_s"])
    assert one.exit_code == 0
    assert one.output.splitlines()[:2] == ["router.resume_timeout_s: number > 0 (seconds)", "default: 60.0"]
    every = json.loads(run(app, ["config", "explain", "--json"]).stdout)
    assert {row["path"] for row in every} == {key.path for key in keys()}
    assert json.loads(run(app, ["config", "schema"]).stdout) == json.loads(json.dumps(platform_schema()))
    unknown = run(app, ["config", "explain", "no.such"])
    assert unknown.exit_code == 1
    assert "no key 'no.such'" in unknown.output
