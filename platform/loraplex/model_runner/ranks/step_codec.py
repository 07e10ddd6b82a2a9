"""A StepPlan in few bytes: page tables as what is new in them, adapters as numbers, all rows as columns.

Both sides keep the page table of each slot, which only grows between a start and the next. Called by the group's
executor, once a step for all ranks, and by each rank.
"""

from collections.abc import Mapping
from itertools import chain, repeat
from operator import sub

from msgspec.structs import astuple

from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.step import Row, StepPlan
from loraplex.model_runner.ranks.messages import Step

_NO_ADAPTER = -1
_NUM_COLUMNS = 6
_ROW_FIELDS = ("slot", "token_ids", "start", "pages", "adapter", "samples")
assert Row.__struct_fields__ == _ROW_FIELDS, "the columns are read in the order of the fields"


class StepEncoder:
    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        """Entries of each slot's page table that the ranks have."""

    def encode(self, plan: StepPlan, adapters: Mapping[Digest, int]) -> Step:
        """``adapters``: the numbers of the loaded ones. Conflict when one is not loaded; then nothing has changed."""
        rows, known = plan.rows, self._known
        # Column by column, in loops of C: this is on the way of every step.
        columns = zip(*map(astuple, rows), strict=True) if rows else ((),) * len(_ROW_FIELDS)
        slots, tokens, positions, tables, digests, samples = columns
        try:
            numbers = [_NO_ADAPTER if digest is None else adapters[digest] for digest in digests]
        except KeyError as error:
            raise Conflict(f"adapter {error.args[0]} is not loaded") from None
        for start in plan.starts:
            known[start.slot] = 0
        num_pages = list(map(len, tables))
        num_new = list(map(sub, num_pages, map(known.get, slots, repeat(0))))
        known.update(zip(slots, num_pages, strict=True))
        values = [*slots, *positions, *map(len, tokens), *num_new, *numbers, *map(int, samples)]
        values += chain.from_iterable(tokens)
        for table, count in zip(tables, num_new, strict=True):
            if count:
                values += table[-count:]
        return Step(plan.step_id, plan.releases, plan.starts, len(rows), values)


class StepDecoder:
    def __init__(self) -> None:
        self._pages: dict[int, list[int]] = {}
        self._digests: dict[int, Digest | None] = {_NO_ADAPTER: None}

    def name_adapter(self, number: int, digest: Digest) -> None:
        """Steps mean ``digest`` by ``number`` from now on."""
        self._digests[number] = digest

    def forget_adapter(self, number: int) -> None:
        del self._digests[number]

    def decode(self, step: Step) -> StepPlan:
        pages, digests, count = self._pages, self._digests, step.num_rows
        for start in step.starts:
            pages[start.slot] = []
        values = step.numbers
        columns = [values[first : first + count] for first in range(0, _NUM_COLUMNS * count, count)] if count else []
        token = _NUM_COLUMNS * count
        page = token + (sum(columns[2]) if count else 0)
        rows = []
        for slot, start_position, num_tokens, num_new, adapter, samples in zip(*columns, strict=True):
            table = pages.setdefault(slot, [])
            if num_new:
                table += values[page : page + num_new]
                page += num_new
            rows.append(
                Row(
                    slot=slot,
                    token_ids=tuple(values[token : token + num_tokens]),
                    start=start_position,
                    pages=table,
                    adapter=digests[adapter],
                    samples=bool(samples),
                )
            )
            token += num_tokens
        return StepPlan(step_id=step.step_id, releases=step.releases, starts=step.starts, rows=tuple(rows))
