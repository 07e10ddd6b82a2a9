"""The chart, rendered and linted by Helm's own library, offline."""

import json
from pathlib import Path
from typing import Any

import yaml

try:
    import helm_python
except ImportError:
    raise AssertionError("helm is missing: pip install --constraint requirements.lock --editable '.[dev]'") from None

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "loraplex"
VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "demo", "ml"
NAME = "demo-loraplex"

Manifest = dict[str, Any]


def ci_values(name: str) -> dict[str, Any]:
    """Of ``ci/NAME-values.yaml``."""
    return dict(yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text()))


def render(values: dict[str, Any]) -> list[Manifest]:
    """All objects, after Helm has checked the values. Raises helm_python.HelmError."""
    return [manifest for text in templates(values).values() for manifest in yaml.safe_load_all(text) if manifest]


def templates(values: dict[str, Any]) -> dict[str, str]:
    """Rendered text by template, but for the notes."""
    return {name: text for name, text in _texts(values).items() if name.endswith(".yaml")}


def notes(values: dict[str, Any]) -> str:
    """What Helm says after it has installed the chart."""
    return _texts(values)["loraplex/templates/NOTES.txt"]


def _texts(values: dict[str, Any]) -> dict[str, str]:
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        return dict(chart.render(values, name=RELEASE, namespace=NAMESPACE))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def ray_service(manifests: list[Manifest]) -> dict[str, Any]:
    """The spec of the one RayService."""
    (found,) = of_kind(manifests, "RayService")
    return dict(found["spec"])


def pod_templates(manifests: list[Manifest]) -> dict[str, dict[str, Any]]:
    """By the name of the group: head, gateways and the workers'."""
    cluster = ray_service(manifests)["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


def serve_config(manifests: list[Manifest]) -> dict[str, Any]:
    return dict(yaml.safe_load(ray_service(manifests)["serveConfigV2"]))


def platform_text(manifests: list[Manifest]) -> str:
    """The platform's config as both applications get it."""
    texts = {application["args"]["config"] for application in serve_config(manifests)["applications"]}
    (text,) = texts
    json.loads(text)
    return str(text)
