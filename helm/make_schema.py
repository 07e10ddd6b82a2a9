"""Writes the chart's values.schema.json: the chart's own values (values_schema.yaml) and, as ``platform``, the
platform's config without what the chart sets. Run it after a change of either; a test
compares."""

import json
from pathlib import Path
from typing import Any

import yaml
from loraplex.config.schema import platform_schema

HERE = Path(__file__).parent
OUTPUT = HERE / "loraplex" / "values.schema.json"
SET_BY_THE_CHART = {
    "PlatformConfig": ("data_dir", "listen", "admin_key_file"),
    "ServeConfig": ("gateways", "gateway_resources"),
    "RayConfig": ("address", "single_machine", "num_cpus", "num_gpus", "object_store_bytes"),
    "ControllerConfig": ("database",),
    "FleetConfig": ("autoscale",),
    "RegistryConfig": ("artifact_url",),
    "TraceConfig": ("url",),
}


def values_schema() -> str:
    """The file's text."""
    schema = yaml.safe_load((HERE / "values_schema.yaml").read_text("utf-8"))
    platform = _plain(platform_schema())
    for struct, names in SET_BY_THE_CHART.items():
        for name in names:
            del platform["$defs"][struct]["properties"][name]
    schema["properties"]["platform"] = {"$ref": platform["$ref"]}
    schema["$defs"] |= platform["$defs"]
    return json.dumps(schema, indent=1) + "\n"


def _plain(node: Any) -> Any:
    """Without defaults and descriptions, which Helm does not use: fewer lines change when the config does."""
    if isinstance(node, list):
        return [_plain(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _properties(value) if key in ("properties", "$defs") else _plain(value)
        for key, value in node.items()
        if key not in ("default", "description", "title")
    }


def _properties(named: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in named.items()}


if __name__ == "__main__":
    OUTPUT.write_text(values_schema(), "utf-8")
