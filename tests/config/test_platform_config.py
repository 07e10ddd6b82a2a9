"""The one YAML file: composed, checked, and every mistake named with its place."""

from pathlib import Path

import pytest
from loraplex.config.platform import load_platform_config, parse_platform_config
from loraplex.core.errors import BadConfig

FLEETS = Path(__file__).parents[2] / "cluster-configs" / "fleets"
GOOD = "base_models: [{id: a, model: 'random:tiny-llama'}]\n"


@pytest.mark.parametrize("file", sorted(FLEETS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_fleet_loads(file: Path) -> None:
    config = load_platform_config(file)
    assert config.base_models


def test_parts_keep_their_defaults_and_derive_from_the_data_directory() -> None:
    config = parse_platform_config(GOOD + "data_dir: /somewhere\n", source="x.yaml")
    assert config.trace_url == "/somewhere/traces"
    assert config.controller_options().data_dir == Path("/somewhere")
    assert config.base_models[0].base_model_id == "a"
    assert parse_platform_config(GOOD + "data_dir: ~/x\n", source="x.yaml").root == Path.home() / "x"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("base_models: []\n", "base_models"),
        ("", "object"),
        ("[1, 2]", "object"),
        (GOOD + "gatway: {}\n", "gatway"),
        (
            "base_models: [{id: a, model: m, engine: {max_runing: 3}}]\n",
            "base_models[0].engine.max_runing: there is no such key",
        ),
        ("base_models: [{id: a, model: m, engine: {max_running: 0}}]\n", "max_running"),
        ("base_models: [{id: a, model: m}, {id: a, model: m}]\n", "twice"),
        ("base_models: [{id: a, model: m, replicas: -1}]\n", "replicas"),
        ("base_models: [{id: a, model: m, num_cpus: 0}]\n", "num_cpus"),
        ("base_models: [{id: a, model: m, engine: {max_running: 300}}]\n", "max_rows"),
        ("base_models: [{id: a, model: m, executor: {max_step_tokens: 100}}]\n", "engine.max_step_tokens"),
        (GOOD + "demo: true\n", "demo"),
        (GOOD + "listen: {http_port: 70000}\n", "http_port"),
        (GOOD + "listen: {http_port: eight}\n", "http_port"),
        (GOOD + "serve: {proxy: nginx}\n", "serve.proxy"),
        ("a: [b\n", "not YAML"),
        (GOOD + "demo: false\ndemo: true\n", "'demo' appears twice in \"<unicode string>\", line 3"),
        (GOOD + "listen: {http_port: 1, http_port: 2}\n", "'http_port' appears twice"),
        (GOOD + "data_dir: {{ root }}\n", 'a key is no word in "<unicode string>", line 2'),
    ],
)
def test_mistakes_are_named_with_file_and_key(text: str, named: str) -> None:
    with pytest.raises(BadConfig) as error:
        parse_platform_config(text, source="fleet.yaml")
    assert error.value.message.startswith("fleet.yaml: ")
    assert named in error.value.message
    assert "\n" not in error.value.message


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"nowhere\.yaml: cannot be read: No such file or directory$"):
        load_platform_config(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadConfig, match=r"binary\.yaml: is no text in UTF-8$"):
        load_platform_config(tmp_path / "binary.yaml")
