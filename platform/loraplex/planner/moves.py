"""Neighbours of a choice: groups change their shape or owner, cells of adapters are cut, joined, or exchange adapters.

Every move keeps a group for each base and a cell for each adapter. Called by ``search``.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from loraplex.core.ids import BaseModelId
from loraplex.planner.capacity import Demand
from loraplex.planner.cells import Cell, cell, cells_of, joined
from loraplex.planner.packing import EVERYWHERE, AdapterSet, Choice
from loraplex.planner.pools import OUTPUT_COST
from loraplex.planner.problem import Kind
from loraplex.planner.scoring import Scored, Scorer
from loraplex.planner.starts import best_kinds
from loraplex.simulator.types import FloatArray

SPREADS = (EVERYWHERE, 1.0, 2.0, 4.0, 8.0)
_KINDS_OF_MOVES = ("exchange", "cut", "join", "shift", "spread")
_ODDS = (10, 3, 1, 3, 1)


class Moves:
    def __init__(self, scorer: Scorer, demand: Mapping[BaseModelId, Demand], seed: int) -> None:
        self._scorer, self._demand = scorer, demand
        self._draw = random.Random(seed)
        traffic = scorer.traffic
        self._load = traffic.requests_per_s * (traffic.prompt_tokens + OUTPUT_COST * traffic.output_tokens)
        ranks = np.array([size.lora_rank for size in scorer.problem.adapters], dtype=np.float64)
        self._orders: dict[str, FloatArray] = {
            "prompt length": traffic.prompt_tokens,
            "output length": traffic.output_tokens,
            "rate": traffic.requests_per_s,
            "rank": ranks,
        }
        self._asked: dict[BaseModelId, AdapterSet] = {
            base: frozenset(adapter for adapter in adapters.tolist() if traffic.requests_per_s[adapter] > 0)
            for base, adapters in traffic.base.items()
        }
        self._kinds = [
            kind for kind in scorer.kinds if all(scorer.capacity[kind, b].requests_per_s > 0 for b in kind.bases)
        ]
        arrivals = scorer.problem.arrivals
        self._divisible = not bool((arrivals.adapter < 0).any())

    def neighbour(self, now: Scored) -> tuple[Choice, str] | None:
        """One, and what was done; None when the move that was drawn is not possible."""
        cells = cells_of(now.choice)
        made: tuple[list[Cell], str] | None
        match self._draw.choices(_KINDS_OF_MOVES, weights=_ODDS)[0]:
            case "exchange":
                made = self._exchanged(now, cells)
            case "cut":
                made = self._cut(cells)
            case "join":
                made = self._joined(cells)
            case "shift":
                made = self._shifted(now, cells)
            case _:
                base, spread = self._draw.choice(self._scorer.problem.bases), self._draw.choice(SPREADS)
                return replace(now.choice, spread={**now.choice.spread, base: spread}), f"spread {spread:g} of {base}"
        if made is None or not self._serves_all(made[0]):
            return None
        return joined(made[0], now.choice.spread), made[1]

    def _exchanged(self, now: Scored, cells: list[Cell]) -> tuple[list[Cell], str] | None:
        """Groups of one cell make room for groups of another kind, in the same cell or another."""
        taker = self._draw.choice(cells)
        giver = taker if self._draw.random() < 0.5 else self._draw.choice(cells)
        able = [kind for kind in self._kinds if set(kind.bases) <= taker.bases]
        target = self._draw.choice(able)
        goal = target.shape.num_ranks * self._draw.choice((1, 1, 2, 4))
        kept, freed = self._freed(now, giver, target, goal)
        if freed < target.shape.num_ranks:
            return None
        count, left = divmod(freed, target.shape.num_ranks)
        kept += self._fill(giver, target.gpu, left)
        made = [one for one in cells if one is not giver and one is not taker]
        if giver is taker:
            made.append(cell([*kept, *([target] * count)], giver.adapters))
        else:
            made.append(cell(kept, giver.adapters))
            made.append(cell([*taker.groups, *([target] * count)], taker.adapters))
            if not kept:
                return None
        return made, f"{freed} GPUs become {count} x {target}"

    def _freed(self, now: Scored, giver: Cell, target: Kind, goal: int) -> tuple[list[Kind], int]:
        """The groups that stay, and the GPUs of the others: mostly those with the least to do."""
        busy: dict[Kind, list[float]] = {}
        for kind, share in zip(now.choice.groups, now.busy.tolist(), strict=True):
            busy.setdefault(kind, []).append(share)
        mean = [float(np.mean(busy[kind])) + self._draw.random() * 0.5 for kind in giver.groups]
        kept, freed = [], 0
        for index in sorted(range(len(mean)), key=mean.__getitem__):
            kind = giver.groups[index]
            if freed < goal and kind.gpu == target.gpu and kind != target:
                freed += kind.shape.num_ranks
            else:
                kept.append(kind)
        return kept, freed

    def _fill(self, giver: Cell, gpu: str, left: int) -> list[Kind]:
        """Groups of the giver's bases on what is left."""
        made: list[Kind] = []
        base = self._draw.choice(sorted(giver.bases))
        for kind in best_kinds(self._scorer.problem, self._scorer.capacity, base):
            if kind.gpu == gpu:
                count, left = divmod(left, kind.shape.num_ranks)
                made += [kind] * count
        return made

    def _cut(self, cells: list[Cell]) -> tuple[list[Cell], str] | None:
        """A cell becomes two, by the order of some property of its adapters, groups divided by load."""
        whole = self._draw.choice(cells)
        name = self._draw.choice(tuple(self._orders))
        share = self._draw.uniform(0.15, 0.85)
        if len(whole.bases) > 1 or len(whole.groups) < 2 or not self._divisible:
            return None
        members = self._ordered(whole, name)
        passed = np.cumsum(self._load[members])
        at = int(np.searchsorted(passed, share * passed[-1])) if len(passed) else 0
        if not 0 < at < len(members):
            return None
        groups = list(whole.groups)
        self._draw.shuffle(groups)
        low: list[Kind] = []
        wanted = share * whole.num_gpus * self._draw.uniform(0.7, 1.3)
        while len(groups) > 1 and (not low or sum(kind.shape.num_ranks for kind in low) < wanted):
            low.append(groups.pop())
        made = [one for one in cells if one is not whole]
        made += [cell(low, frozenset(members[:at])), cell(groups, frozenset(members[at:]))]
        return made, f"adapters cut by {name}: {at} on {len(low)} groups, {len(members) - at} on {len(groups)}"

    def _joined(self, cells: list[Cell]) -> tuple[list[Cell], str] | None:
        pairs = _pairs(cells)
        if not pairs:
            return None
        left, right = self._draw.choice(pairs)
        base = next(iter(left.bases))
        members = (left.adapters or frozenset()) | (right.adapters or frozenset())
        made = [one for one in cells if one is not left and one is not right]
        made.append(cell(left.groups + right.groups, None if members >= self._asked[base] else members))
        return made, f"{len(left.groups)} and {len(right.groups)} groups of {base} share their adapters"

    def _shifted(self, now: Scored, cells: list[Cell]) -> tuple[list[Cell], str] | None:
        """Some adapters go from one cell to another: those at the end of an order, or those that lose most."""
        pairs = _pairs(cells)
        if not pairs:
            return None
        left, right = self._draw.choice(pairs)
        if self._draw.random() < 0.5:
            left, right = right, left
        name = self._draw.choice((*self._orders, "requests lost"))
        members = self._ordered(left, name, now.lost)
        count = max(1, int(len(members) * self._draw.choice((0.01, 0.03, 0.1, 0.25))))
        if count >= len(members):
            return None
        if name == "requests lost" or self._draw.random() < 0.5:
            members = members[::-1]
        going = frozenset(members[:count])
        made = [one for one in cells if one is not left and one is not right]
        made.append(Cell(left.groups, (left.adapters or frozenset()) - going))
        made.append(Cell(right.groups, (right.adapters or frozenset()) | going))
        return made, f"{count} adapters by {name} to {len(right.groups)} groups"

    def _ordered(self, one: Cell, name: str, lost: FloatArray | None = None) -> list[int]:
        by = self._orders.get(name, lost)
        assert by is not None
        asked = one.adapters if one.adapters is not None else self._asked[next(iter(one.bases))]
        return sorted(asked, key=lambda adapter: (float(by[adapter]), adapter))

    def _serves_all(self, cells: Sequence[Cell]) -> bool:
        served = {base for one in cells for base in one.bases}
        return all(base in served for base, demand in self._demand.items() if demand.requests_per_s > 0)


def _pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Cells of one base, the same for both, each with its own adapters."""
    alone = [one for one in cells if len(one.bases) == 1 and one.adapters is not None]
    return [(left, right) for i, left in enumerate(alone) for right in alone[i + 1 :] if left.bases == right.bases]
