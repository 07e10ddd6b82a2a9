"""What Kubernetes would say of a manifest: core kinds by the schemas of Kubernetes itself, RayService by KubeRay's
custom resource definition and its pods by Kubernetes', the Prometheus operator's two kinds by the parts that we use."""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema

from tests.helm.rendered import ROOT, Manifest

try:
    import kubernetes_validate
except ImportError:
    raise AssertionError(
        "kubernetes-validate is missing: pip install --constraint requirements.lock --editable '.[dev]'"
    ) from None

KUBERNETES = "1.35"
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}


def errors(manifest: Manifest) -> list[str]:
    """All of them, each with its path; no unknown key passes."""
    if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
        return _schema_errors(manifest, _MONITORING[manifest["kind"]])
    if manifest["kind"] != "RayService":
        return _kubernetes_errors(manifest)
    found = _schema_errors(manifest, _closed(_ray_service()))
    cluster = manifest["spec"].get("rayClusterConfig", {})
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group.get("template", {})}
        found += _kubernetes_errors(pod)
    return found


def _kubernetes_errors(manifest: Manifest) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{manifest['kind']}: {error}"]
    return []


def _schema_errors(manifest: Manifest, schema: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{manifest['kind']} {error.json_path}: {error.message}" for error in found]


@cache
def _ray_service() -> dict[str, Any]:
    text = gzip.decompress((ROOT / "tests/data/kuberay/rayservices.v1.json.gz").read_bytes())
    (version,) = json.loads(text)["spec"]["versions"]
    return dict(version["schema"]["openAPIV3Schema"])


def _closed(schema: Any) -> Any:
    """OpenAPI as JSON Schema: unknown keys, which the API server drops in silence, are errors."""
    if isinstance(schema, list):
        return [_closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = dict(_closed_entries(schema))
    if "properties" in closed and "additionalProperties" not in closed:
        closed["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return closed


def _closed_entries(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in schema.items():
        if key == "properties":
            # A key of the object may itself be called `properties` or `type`.
            yield key, {name: _closed(entry) for name, entry in value.items()}
        else:
            yield key, _closed(value)


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _resource(group_version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = _object(("name",), name={"type": "string"}, labels=_LABELS, annotations=_LABELS)
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": group_version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


_RULE = _object(
    ("alert", "expr", "labels", "annotations"),
    alert={"type": "string"},
    expr={"type": "string"},
    **{"for": {"type": "string", "pattern": "^[0-9]+[smh]$"}},
    labels=_LABELS,
    annotations=_object(("summary", "runbook"), summary={"type": "string"}, runbook={"type": "string"}),
)
_CREDENTIALS = _object(("name", "key"), name={"type": "string", "minLength": 1}, key={"type": "string"})
_ENDPOINT = _object(
    ("port",),
    port={"type": "string"},
    path={"type": "string"},
    interval={"type": "string"},
    authorization=_object(type={"type": "string"}, credentials=_CREDENTIALS),
)
_MONITORING = {
    "PrometheusRule": _resource(
        "monitoring.coreos.com/v1",
        "PrometheusRule",
        _object(
            ("groups",),
            groups={
                "type": "array",
                "items": _object(
                    ("name", "rules"), name={"type": "string"}, rules={"type": "array", "items": _RULE, "minItems": 1}
                ),
            },
        ),
    ),
    "ServiceMonitor": _resource(
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
        _object(
            ("selector", "endpoints"),
            selector=_object(matchLabels=_LABELS),
            endpoints={"type": "array", "items": _ENDPOINT, "minItems": 1},
        ),
    ),
}
"""https://prometheus-operator.dev/docs/api-reference/api/"""
