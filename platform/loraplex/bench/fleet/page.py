"""Results of a fleet as one self-contained HTML page: for each load its plans, the best first, measured beside
predicted. Pure: a table in, text out. Called by ``__main__`` and the command ``bench fleet``.
"""

import math
from collections.abc import Sequence
from html import escape

import msgspec
import numpy as np

from loraplex.bench.fleet.options import PLANNER
from loraplex.bench.fleet.ranking import Ranked, ranked
from loraplex.bench.fleet.results import ALL, Figure, FleetRow, FleetTable
from loraplex.pages.grouped_bars import Bars, grouped_bars
from loraplex.pages.line_chart import Series, line_chart
from loraplex.pages.page import bullets, figures, folded, page, paragraph, section, subsection, table

_NEAR = {"attainment": 0.02, "ttft_p50_s": 0.05, "ttft_p99_s": 0.05}
"""A prediction that is no farther off is near: of attainment points, of TTFT shares."""
_CLOSE = 0.01
"""Attainment that a plan may be behind the best and still count as good as it."""
_NO_BREAK = "\N{NO-BREAK SPACE}"
_QUANTILES = np.linspace(0.005, 0.995, 100)
_FIGURES = ("attainment %", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms")
_MANY_LOADS = 4
"""With more of them the charts of each are folded away."""


def fleet_page(results: FleetTable) -> str:
    """One HTML document, UTF-8, of at least one row."""
    rows = results.rows
    loads = {load: ranked([row for row in rows if row.workload == load]) for load in _loads(rows)}
    devices = ", ".join(dict.fromkeys(row.device_name for row in rows))
    parts = [_summary(rows, loads), _overview(loads)]
    parts += [_load(load, plans, is_one_of_many=len(loads) > _MANY_LOADS) for load, plans in loads.items()]
    if results.left:
        parts.append(section("Not measured", bullets(results.left), note="The time did not last."))
    return page(f"Plans on {devices}", [*parts, _origin(results)])


def is_good_as_best(one: Ranked) -> bool:
    """First, or behind by no more than a point or than chance explains."""
    return one.behind <= _CLOSE or one.interval[0] <= 0


def _loads(rows: Sequence[FleetRow]) -> list[str]:
    return list(dict.fromkeys(row.workload for row in rows))


def _summary(rows: Sequence[FleetRow], loads: dict[str, tuple[Ranked, ...]]) -> str:
    pairs = [(str(len(loads)), "loads"), (str(len(rows)), "runs of a plan under a load")]
    planned = [one for plans in loads.values() for one in plans if PLANNER in one.row.placements]
    if planned:
        first = sum(map(is_good_as_best, planned))
        pairs.append((f"{first} of {len(planned)}", "loads in which the planner's plan is as good as the best"))
    for name, what in (
        ("attainment", "attainments predicted within 2 points"),
        ("ttft_p50_s", "TTFT p50 within 5 %"),
        ("ttft_p99_s", "TTFT p99 within 5 %"),
    ):
        told = [row.figures[ALL][name] for row in rows]
        near = sum(_is_near(name, one) is True for one in told)
        pairs.append((f"{near} of {len(told)}", what))
    note = (
        "As good as the best: at most a point of attainment behind, or not more than chance explains (bootstrap over "
        "the requests, which all plans of a load share). A tick is a prediction within 2 points of attainment, or 5 % "
        "of TTFT."
    )
    return figures(pairs) + f'<p class="note">{escape(note)}</p>'


def _overview(loads: dict[str, tuple[Ranked, ...]]) -> str:
    names = list(dict.fromkeys(_name(one.row) for plans in loads.values() for one in plans))
    by_load = [{_name(one.row): one.attainment for one in plans} for plans in loads.values()]
    bars = [Bars(name=name, values=[known.get(name, math.nan) for known in by_load]) for name in names]
    chart = grouped_bars([_lines(load) for load in loads], bars, y_label="attainment, measured", y_high=1.0)
    return section("Attainment by load", chart)


def _load(load: str, plans: tuple[Ranked, ...], *, is_one_of_many: bool) -> str:
    rows = [one.row for one in plans]
    strong = next((place for place, one in enumerate(plans) if PLANNER in one.row.placements), -1)
    late_ms = max(row.lateness.p99_ms for row in rows)
    columns = ["plan", "groups", "points behind (95 %)", *_FIGURES, "failed"]
    charts = [
        subsection("Attainment", _measured_and_predicted(rows)),
        subsection("Time to first token, measured", _distribution(rows)),
    ]
    parts = [
        table(columns, [_cells(one) for one in plans], strong=strong),
        *([folded("Charts", *charts)] if is_one_of_many else charts),
    ]
    bases = [name for name in rows[0].figures if name != ALL]
    if len(bases) > 1:
        by_base = [
            [base, _name(row), *_figures(row.figures[base])] for base in bases for row in rows if base in row.figures
        ]
        parts.append(folded("By base", table(["base", "plan", *_FIGURES], by_base)))
    errors = [f"{_name(row)}: {times} x {message}" for row in rows for message, times in row.errors.items()]
    parts += [bullets(errors)] if errors else []
    note = f"{rows[0].load}; {rows[0].requests:,} requests, sent late by at most {late_ms:.1f} ms (p99)."
    return section(load, *parts, note=f"{note} Figures are measured / predicted.")


def _cells(one: Ranked) -> list[str | float | None]:
    row = one.row
    low, high = (100 * side for side in one.interval)
    behind = f"{100 * one.behind:.1f} ({low:.1f} to {high:.1f})".replace(" ", _NO_BREAK)
    return [_name(row), row.groups, behind, *_figures(row.figures[ALL]), row.unanswered]


def _figures(told: dict[str, Figure]) -> list[str]:
    """Of attainment, TTFT p50 and p99, TPOT p50."""
    return [_pair(name, told[name]) for name in ("attainment", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s")]


def _pair(name: str, one: Figure) -> str:
    """Measured / predicted (how far that is off), and a mark where a limit holds for it."""
    is_share = name == "attainment"
    scale, form = (100, ".1f") if is_share else (1e3, ",.4g")
    sides = ["–" if side is None else f"{scale * side:{form}}" for side in (one.measured, one.predicted)]
    words = " / ".join(sides)
    if one.difference is not None:
        words += f" ({100 * one.difference:+.1f}{'' if is_share else ' %'})"
    near = _is_near(name, one)
    return (words if near is None else f"{words} {'✓' if near else '✗'}").replace(" ", _NO_BREAK)


def _is_near(name: str, one: Figure) -> bool | None:
    """None: no limit is set, or there is nothing to compare."""
    if name not in _NEAR or one.difference is None:
        return None
    return abs(one.difference) <= _NEAR[name]


def _measured_and_predicted(rows: Sequence[FleetRow]) -> str:
    told = [row.figures[ALL]["attainment"] for row in rows]
    bars = [
        Bars(name="measured", values=[_or_nan(one.measured) for one in told]),
        Bars(name="predicted", values=[_or_nan(one.predicted) for one in told]),
    ]
    return grouped_bars([_lines(_name(row)) for row in rows], bars, y_label="attainment", y_high=1.0, height=200)


def _distribution(rows: Sequence[FleetRow]) -> str:
    """Cumulative, over all requests: what has no answer keeps the curve below 1."""
    lines = []
    for row in rows:
        served = np.array([value for value in row.ttft_s if value is not None and value > 0])
        if len(served):
            share = len(served) / len(row.ttft_s)
            x = 1e3 * np.quantile(served, _QUANTILES)
            lines.append(Series(name=_name(row), x=x.tolist(), y=(_QUANTILES * share).tolist()))
    if not lines:
        return paragraph("No request has one.")
    return line_chart(lines, x_label="ms", y_label="share of requests", y_high=1.0, x_log=True, dots=False)


def _origin(results: FleetTable) -> str:
    rows = results.rows
    targets = [
        f"{base}: TTFT {1e3 * target.ttft_s:.4g} ms, TPOT {1e3 * target.tpot_s:.4g} ms"
        for base, target in results.targets.items()
    ]
    commits = ", ".join(dict.fromkeys(row.commit or "not known" for row in rows))
    torch_versions = ", ".join(dict.fromkeys(row.torch_version for row in rows))
    commands = (
        "loraplex bench fleet prepare experiment.json prepared.json\n"
        "loraplex bench fleet measure prepared.json results.json\n"
        "loraplex bench fleet show results.json --html results.html"
    )
    text = msgspec.json.format(msgspec.json.encode(results.experiment), indent=1).decode()
    return section(
        "Where it comes from",
        bullets([f"commit {commits}", f"torch {torch_versions}", *(f"targets of {line}" for line in targets)]),
        f"<pre><code>{escape(commands)}</code></pre>",
        folded("experiment.json", f"<pre><code>{escape(text)}</code></pre>"),
    )


def _name(row: FleetRow) -> str:
    return ", ".join(row.placements)


def _lines(words: str) -> str:
    """Over several lines where commas or hyphens allow."""
    return words.replace(", ", ",\n").replace("-cv-", "\ncv ")


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
