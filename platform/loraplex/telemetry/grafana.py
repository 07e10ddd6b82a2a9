"""Grafana dashboards from rows of panels: the JSON that Grafana imports. Knows no metric; ``dashboards`` has them.

Each dashboard asks which Prometheus, namespace and service it shows; where the labels do not exist, as without
Kubernetes, ``All`` shows everything.
"""

import json
from dataclasses import dataclass
from typing import Any

MINE = 'namespace=~"$namespace", service=~"$service"'
"""Selects the series of the platform that is shown."""

_ALL = ".*"
_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2
_SCHEMA_VERSION = 39
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    unit: str
    """Grafana's name of it: ``s``, ``reqps``, ``percentunit``, ``short``."""
    series: dict[str, str]
    """Legend -> PromQL."""
    about: str = ""
    """One sentence for who does not know what to look for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    name: str
    title: str
    panels: tuple[Panel, ...]
    choices: tuple[tuple[str, str], ...] = ()
    """Further variables: (label, a metric that has it)."""

    def json(self) -> str:
        content = {
            "uid": f"loraplex-{self.name}",
            "title": self.title,
            "tags": ["loraplex"],
            "schemaVersion": _SCHEMA_VERSION,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "links": [{"type": "dashboards", "tags": ["loraplex"], "title": "Loraplex", "asDropdown": True}],
            "templating": {"list": self._variables()},
            "panels": [_panel(index, panel) for index, panel in enumerate(self.panels)],
        }
        return json.dumps(content, indent=1) + "\n"

    def _variables(self) -> list[dict[str, Any]]:
        source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
        always = (("namespace", "loraplex_gateway_ready"), ("service", "loraplex_gateway_ready"))
        return [source, *(_variable(name, metric) for name, metric in (*always, *self.choices))]


def _variable(name: str, metric: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "query": f"label_values({metric}, {name})",
        "refresh": 2,
        "includeAll": True,
        "allValue": _ALL,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "gridPos": {
            "h": _HEIGHT,
            "w": _WIDTH,
            "x": _WIDTH * (index % _COLUMNS),
            "y": _HEIGHT * (index // _COLUMNS),
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": f"S{number}", "expr": expression, "legendFormat": legend}
            for number, (legend, expression) in enumerate(panel.series.items())
        ],
    }
