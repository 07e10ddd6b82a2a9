"""A StepPlan in few bytes: page tables as what is new in them, adapters as numbers, all rows as columns.

Both sides keep the page table of each slot, which only grows between a start and the next. Called by the group's
executor, once a step for all ranks, and by each rank.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import chain, compress, count, islice, repeat
from operator import ne

from msgspec.structs import astuple

from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.step import Row, StepPlan
from loraplex.model_runner.ranks.messages import Step

_NO_ADAPTER = -1
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
        new_pages: list[int] = []
        for row in compress(count(), map(ne, map(len, tables), map(known.get, slots, repeat(0)))):
            slot, table = slots[row], tables[row]
            new = table[known.get(slot, 0) :]
            new_pages += (row, len(new), *new)
            known[slot] = len(table)
        num_tokens = list(map(len, tokens))
        only_decodes = num_tokens.count(1) == samples.count(True) == len(rows)
        values = [*slots, *positions, *numbers]
        if not only_decodes:
            values += num_tokens
            values += map(int, samples)
        values += chain.from_iterable(tokens)
        return Step(plan.step_id, plan.releases, plan.starts, len(rows), only_decodes, values, new_pages)


class StepDecoder:
    def __init__(self) -> None:
        self._pages: defaultdict[int, list[int]] = defaultdict(list)
        self._digests: dict[int, Digest | None] = {_NO_ADAPTER: None}

    def name_adapter(self, number: int, digest: Digest) -> None:
        """Steps mean ``digest`` by ``number`` from now on."""
        self._digests[number] = digest

    def forget_adapter(self, number: int) -> None:
        del self._digests[number]

    def decode(self, step: Step) -> StepPlan:
        pages, values, num_rows = self._pages, step.values, step.num_rows
        for start in step.starts:
            pages[start.slot] = []

        def column(index: int) -> list[int]:
            return values[index * num_rows : (index + 1) * num_rows]

        tokens: Iterable[tuple[int, ...]]
        samples: Iterable[bool]
        if step.only_decodes:
            tokens, samples = zip(column(3), strict=True), repeat(True, num_rows)
        else:
            flat = iter(values[5 * num_rows :])
            tokens, samples = (tuple(islice(flat, length)) for length in column(3)), map(bool, column(4))
        slots = column(0)
        tables = list(map(pages.__getitem__, slots))
        new_pages, at = step.new_pages, 0
        while at < len(new_pages):
            first, end = at + 2, at + 2 + new_pages[at + 1]
            tables[new_pages[at]] += new_pages[first:end]
            at = end
        digests = map(self._digests.__getitem__, column(2))
        rows = [
            Row(slot=slot, token_ids=token_ids, start=position, pages=table, adapter=digest, samples=draws)
            for slot, token_ids, position, table, digest, draws in zip(
                slots, tokens, column(1), tables, digests, samples, strict=True
            )
        ]
        return StepPlan(step_id=step.step_id, releases=step.releases, starts=step.starts, rows=tuple(rows))
