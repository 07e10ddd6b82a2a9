"""What ``loraplex top`` shows, from what the gateways answer: groups, tenants, adapters, queues, attainment.

Pure: answers of ``/v1/status`` and ``/v1/activity`` in, values and tables out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loraplex.cli.output import shown

_LATENCIES = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")
_COUNTS = ("requests", "errors", "good", "prompt_tokens", "output_tokens")
_BELOW = 0.9
"""Attainment that is shown as a warning."""


def overview(
    status: Mapping[str, Any],
    activities: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any] | None,
    passed_s: float,
) -> dict[str, Any]:
    """One state of the platform, as JSON has it. ``status`` is the view of the gateway that answered last,
    ``activities`` the last answer of each gateway; ``before``: the overview ``passed_s`` seconds ago, for rates."""
    replicas = _replicas(status, {} if before is None else _by(before["replicas"], "id"), passed_s)
    return {
        "gateways": [activity["gateway"] for activity in activities],
        "version": [status["epoch"], status["version"]],
        "queued": sum(activity["queued"] for activity in activities),
        "window_s": max(activity["window_s"] for activity in activities),
        "total": _joined([activity["total"] for activity in activities]),
        "replicas": replicas,
        "tenants": _parts(activities, "tenants", ("tenant",)),
        "adapters": _with_residency(_parts(activities, "adapters", ("tenant", "name", "base_model")), status),
    }


def tables(state: Mapping[str, Any], *, top: int, slo: str) -> RenderableType:
    """``top``: how many tenants and adapters."""
    total = state["total"]
    head = Text()
    head.append(f"{shown(total['requests'])} requests in {state['window_s']:.0f} s", style="bold")
    head.append(f", {shown(total['errors'])} errors; within {slo}: ")
    head.append(_percent(total["attainment"]), style=_style(total["attainment"]))
    head.append(f"; {shown(state['queued'])} wait for a replica; {len(state['gateways'])} gateways")
    columns = ["requests", "errors", "attainment", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99 ms"]
    return Group(
        head,
        "",
        _replica_table(state["replicas"]),
        "",
        _table(["tenant", *columns], [[part["tenant"], *_cells(part)] for part in state["tenants"][:top]]),
        "",
        _table(
            ["adapter", *columns, "resident on"],
            [
                [f"{part['tenant']}/{part['name']}", *_cells(part), str(part["num_resident"])]
                for part in state["adapters"][:top]
            ],
        ),
    )


def _replicas(
    status: Mapping[str, Any], before: Mapping[str, Mapping[str, Any]], passed_s: float
) -> list[dict[str, Any]]:
    """Sorted by group; rates over the time since ``before``, None where it is not known."""
    found = []
    for replica in status["replicas"]:
        load = replica["load"] or {}
        old = before.get(replica["id"], {})
        found.append(
            {
                "id": replica["id"],
                "base_model": replica["base_model"],
                "group": replica["group"],
                "shape": replica["shape"],
                "gpu": replica["gpu"],
                "state": "draining" if replica["draining"] else "up" if replica["connected"] else "away",
                "running": load.get("num_running"),
                "waiting": load.get("num_waiting"),
                "queued_tokens": load.get("num_queued_tokens"),
                "free_pages": load.get("num_free_pages"),
                "resident_adapters": len(load["resident_adapters"] or ()) if load else None,
                "planned_adapters": replica["num_planned_adapters"],
                "steps": load.get("steps"),
                "generated_tokens": load.get("generated_tokens"),
                "steps_per_s": _per_s("steps", load, old, passed_s),
                "tokens_per_s": _per_s("generated_tokens", load, old, passed_s),
            }
        )
    return sorted(found, key=lambda replica: (replica["group"], replica["id"]))


def _per_s(field: str, now: Mapping[str, Any], old: Mapping[str, Any], passed_s: float) -> float | None:
    """None when a side has no count, or when the replica began again."""
    count, counted = now.get(field), old.get(field)
    if count is None or counted is None or count < counted or passed_s <= 0:
        return None
    return float(count - counted) / passed_s


def _parts(activities: Sequence[Mapping[str, Any]], field: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The same tenant or adapter of several gateways in one; busiest first."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for activity in activities:
        for part in activity[field]:
            groups.setdefault(tuple(part[name] for name in names), []).append(part)
    joined = [
        {**{k: v for k, v in parts[-1].items() if k != "served"}, **_joined([part["served"] for part in parts])}
        for parts in groups.values()
    ]
    return sorted(joined, key=lambda part: (-part["requests"], *(str(part[name]) for name in names)))


def _joined(served: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts add up; a percentile is that of the slowest gateway."""
    counts: dict[str, Any] = {name: sum(part[name] for part in served) for name in _COUNTS}
    for name in _LATENCIES:
        counts[name] = max((part[name] for part in served if part[name] is not None), default=None)
    counts["attainment"] = counts["good"] / counts["requests"] if counts["requests"] else None
    return counts


def _with_residency(adapters: list[dict[str, Any]], status: Mapping[str, Any]) -> list[dict[str, Any]]:
    loads = [replica["load"] or {} for replica in status["replicas"]]
    resident = [frozenset(load.get("resident_adapters") or ()) for load in loads]
    return [
        {**adapter, "num_resident": sum(adapter["digest"] in digests for digests in resident)} for adapter in adapters
    ]


def _replica_table(replicas: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["group", "shape", "replica", "base", "state", "running", "waiting", "prompt tokens", "free pages"]
    columns += ["adapters", "steps/s", "tokens/s"]
    rows = []
    for replica in replicas:
        shape = replica["shape"]
        rows.append(
            [
                replica["group"] or "-",
                f"{shape['tp']}x{shape['pp']} {replica['gpu']}".strip(),
                replica["id"],
                replica["base_model"],
                Text(replica["state"], style="" if replica["state"] == "up" else "yellow"),
                *(shown(replica[name]) for name in ("running", "waiting", "queued_tokens", "free_pages")),
                shown(replica["resident_adapters"]),
                *(_rate(replica[name]) for name in ("steps_per_s", "tokens_per_s")),
            ]
        )
    return _table(columns, rows, num_words=5)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, num_words: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < num_words else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _cells(part: Mapping[str, Any]) -> list[str | Text]:
    latencies = [None if part[name] is None else 1000 * part[name] for name in _LATENCIES]
    attainment = Text(_percent(part["attainment"]), style=_style(part["attainment"]))
    return [shown(part["requests"]), shown(part["errors"]), attainment, *(shown(value) for value in latencies)]


def _by(parts: Sequence[Mapping[str, Any]], name: str) -> dict[str, Mapping[str, Any]]:
    return {part[name]: part for part in parts}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _style(share: float | None) -> str:
    return "yellow" if share is not None and share < _BELOW else ""
