"""Writes the tables of telemetry.md, between its marks, from the catalogue, the dashboards and the alerts. Run it after
a change of any of them; a test compares."""

from collections.abc import Iterable
from pathlib import Path

from loraplex.telemetry.alerts import ALERTS
from loraplex.telemetry.catalogue import CATALOGUE
from loraplex.telemetry.dashboards import DASHBOARDS
from loraplex.telemetry.metric import Label
from loraplex.telemetry.tracing import ATTRIBUTES

PAGE = Path(__file__).parent / "telemetry.md"


def page(text: str) -> str:
    """``text`` with its tables anew."""
    for name, table in (
        ("metrics", _metrics()),
        ("labels", _labels()),
        ("attributes", ", ".join(f"`{name}`" for name in sorted(ATTRIBUTES)) + "."),
        ("dashboards", _dashboards()),
        ("alerts", _alerts()),
    ):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}{table}\n{end}{rest.split(end)[1]}"
    return text


def _table(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    columns = header.count("|") - 1
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join((header, "|" + columns * "---|", *lines))


def _metrics() -> str:
    return _table(
        "| metric | kind | unit | labels | meaning |",
        (
            (f"`{spec.name}`", spec.kind, spec.unit, ", ".join(f"`{name}`" for name in spec.label_names), spec.help)
            for spec in CATALOGUE
        ),
    )


def _labels() -> str:
    found: dict[Label, list[str]] = {}
    for spec in CATALOGUE:
        for label in spec.labels:
            found.setdefault(label, []).append(spec.name)
    rows = ((f"`{label.name}`", _where(names), label.values, str(label.max_values)) for label, names in found.items())
    return _table("| label | of | values | at most |", rows)


def _where(names: list[str]) -> str:
    parts = sorted({name.removeprefix("loraplex_").split("_")[0] for name in names})
    return ", ".join(f"`loraplex_{part}_*`" for part in parts)


def _dashboards() -> str:
    return _table(
        "| dashboard | panels |",
        ((dashboard.title, "; ".join(panel.title for panel in dashboard.panels)) for dashboard in DASHBOARDS),
    )


def _alerts() -> str:
    return _table(
        "| alert | severity | for | means | what to do |",
        ((f"`{a.name}`", a.severity, a.lasts, a.summary, a.runbook) for a in ALERTS),
    )


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
