"""Where everything lies, as pictures: GPUs with their groups, groups with their adapters. Called by ``page``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loraplex.core.plan import GroupPlan
from loraplex.pages import svg
from loraplex.pages.heat_map import heat_map
from loraplex.pages.style import NUM_COLOURS
from loraplex.planner.report.values import AdapterUse, PlanReport

MAX_GPUS = 256
MAX_ADAPTERS = 40
MAX_GROUPS = 96
_ACROSS = 8
_CELL, _TALL, _HEAD, _GAP = svg.WIDTH / _ACROSS, 50, 18, 10
_NAMED = 5


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    gpu: str
    groups: list[int | None]
    """Of each GPU."""


def gpus_picture(report: PlanReport) -> str:
    """Every node with its GPUs and the groups on them, coloured by base; the first ``MAX_GPUS`` GPUs."""
    busiest = _busiest(report)
    bases = bases_of(report)
    parts: list[str] = []
    for index, base in enumerate(bases):
        parts.append(svg.box(2 + index * 200, 2, 12, 12, f"f{index % NUM_COLOURS}", opacity=0.8))
        parts.append(svg.words(20 + index * 200, 12, svg.fitting(base, 175), anchor="start"))
    x, y, tallest, drawn = 0, 24.0, 0.0, 0
    for node in _nodes(report):
        if drawn + len(node.groups) > MAX_GPUS and drawn:
            break
        drawn += len(node.groups)
        columns = min(len(node.groups), _ACROSS)
        if x + columns > _ACROSS:
            x, y, tallest = 0, y + tallest + _GAP, 0.0
        label = svg.fitting(f"{node.name} ({node.gpu})", columns * _CELL - 4)
        parts.append(svg.words(x * _CELL + 2, y + 12, label, anchor="start", kind="strong"))
        for row, start in enumerate(range(0, len(node.groups), _ACROSS)):
            top = y + _HEAD + row * (_TALL + 2)
            for column, count, group in _runs(node.groups[start : start + _ACROSS]):
                left, width = (x + column) * _CELL + 2, count * _CELL - 4
                if group is None:
                    parts.append(svg.box(left, top, width, _TALL, "free", tip=f"{count} GPUs without a group"))
                else:
                    parts.append(_group(report, group, bases, busiest, left, top, width))
        tallest = max(tallest, _HEAD + -(-len(node.groups) // _ACROSS) * (_TALL + 2))
        x += columns
    return svg.picture(y + tallest + 4, parts, label="Groups on GPUs")


def adapters_picture(report: PlanReport) -> str:
    """Which group served what share of the requests of the busiest adapters, and whether the plan says so."""
    names = [group.name for group in report.plan.groups]
    if len(names) > MAX_GROUPS:
        busiest = sorted(range(len(names)), key=lambda index: -report.groups[index].num_requests)[:MAX_GROUPS]
        names = [names[index] for index in sorted(busiest)]
    shown = report.adapters[:MAX_ADAPTERS]
    shares = np.array([[_share(adapter, name) for name in names] for adapter in shown], dtype=np.float64).reshape(
        len(shown), len(names)
    )
    # A group that lists an adapter which it never served still shows.
    listed = np.array([[name in adapter.groups for name in names] for adapter in shown]).reshape(shares.shape)

    def tip(row: int, column: int) -> str:
        adapter, name = shown[row], names[column]
        why = "listed" if listed[row, column] else "not listed" if adapter.groups else "any group may take it"
        return (
            f"{label(adapter)} on {name} ({why}): {adapter.served_by.get(name, 0):,} of {adapter.requests:,} requests"
        )

    return heat_map(
        [label(adapter) for adapter in shown],
        np.where(listed, np.maximum(shares, 0.02), shares),
        columns=names,
        x_label="groups",
        tip=tip,
        kind=lambda row, column: "heat" if listed[row, column] else "warm",
    )


def label(adapter: AdapterUse) -> str:
    return adapter.name if adapter.tenant is None else f"{adapter.tenant}/{adapter.name}"


def bases_of(report: PlanReport) -> list[str]:
    return list(dict.fromkeys(str(placed.base_model_id) for group in report.plan.groups for placed in group.bases))


def adapters_of(group: GroupPlan) -> str:
    count = sum(len(placed.adapters) for placed in group.bases)
    return f"{count:,} adapters" if count else "any adapter"


def _share(adapter: AdapterUse, group: str) -> float:
    return adapter.served_by.get(group, 0) / max(adapter.requests, 1)


def _nodes(report: PlanReport) -> Iterator[_Node]:
    """Nodes in their order, their groups side by side; groups of which the plan does not say where they lie, last."""
    found = {node.name: _Node(node.name, node.gpu, []) for node in report.nodes}
    for index, group in enumerate(report.plan.groups):
        if group.nodes:
            for name in group.nodes:
                found[name].groups.append(index)
        else:
            anywhere = found.setdefault(f"any node {group.gpu}", _Node("on any nodes", group.gpu, []))
            anywhere.groups.extend([index] * group.shape.num_ranks)
    # Then the plan leaves it open which GPUs stay free.
    is_open = any(not group.nodes for group in report.plan.groups)
    for planned in report.nodes:
        node = found[planned.name]
        if not is_open:
            node.groups.extend([None] * (planned.num_gpus - len(node.groups)))
    return (node for node in found.values() if node.groups)


def _runs(groups: Sequence[int | None]) -> Iterator[tuple[int, int, int | None]]:
    """(First, how many, group) of neighbours that are alike."""
    start = 0
    for index in range(1, len(groups) + 1):
        if index == len(groups) or groups[index] != groups[start]:
            yield start, index - start, groups[start]
            start = index


def _group(
    report: PlanReport,
    index: int,
    bases: Sequence[str],
    busiest: dict[tuple[str, str], list[str]],
    left: float,
    top: float,
    width: float,
) -> str:
    group, use = report.plan.groups[index], report.groups[index]
    busy = use.busy_s / max(report.end_s, 1e-9)
    colours = [bases.index(str(placed.base_model_id)) % NUM_COLOURS for placed in group.bases]
    each = width / max(len(colours), 1)
    parts = [svg.box(left + i * each, top, each, _TALL, f"f{colour}", opacity=0.16) for i, colour in enumerate(colours)]
    parts += [svg.box(left, top, width, _TALL, "edge")]
    if colours:
        parts.append(svg.box(left, top + _TALL - 4, width * min(busy, 1.0), 4, f"f{colours[0]}"))
    shape = f"{group.name}  tp{group.shape.tp} pp{group.shape.pp}"
    names = "+".join(str(placed.base_model_id) for placed in group.bases) or "no base"
    for row, (text, kind) in enumerate(((shape, "strong"), (names, ""), (adapters_of(group), ""))):
        parts.append(svg.words(left + 5, top + 13 + row * 14, svg.fitting(text, width - 8), anchor="start", kind=kind))
    lines = [
        f"{group.name}: tp {group.shape.tp}, pp {group.shape.pp}; in steps {busy:.0%} of the time; "
        f"{use.num_requests:,} requests"
    ]
    for placed in group.bases:
        some = busiest.get((group.name, str(placed.base_model_id)), [])
        lines.append(
            f"{placed.base_model_id}: lists {len(placed.adapters):,} adapters; served most: {', '.join(some) or 'none'}"
        )
    return svg.together("\n".join(lines), parts)


def _busiest(report: PlanReport) -> dict[tuple[str, str], list[str]]:
    """The adapters that a group served most often, by (group, base)."""
    counts: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for adapter in report.adapters:
        for group, count in adapter.served_by.items():
            counts.setdefault((group, adapter.base_model or ""), []).append((count, label(adapter)))
    return {key: [name for _, name in sorted(some, reverse=True)[:_NAMED]] for key, some in counts.items()}
