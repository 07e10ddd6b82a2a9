"""A StepPlan in few bytes: page tables as what is new in them, adapters as numbers, all rows as columns.

Both sides keep the page table of each slot, which only grows between a start and the next. Called by the group's
executor, once a step for all ranks, and by each rank.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice, repeat

from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.step import Row, StepPlan
from loraplex.model_runner.ranks.messages import Step

_NO_ADAPTER = -1


class StepEncoder:
    def __init__(self) -> None:
        self._known: defaultdict[int, int] = defaultdict(int)
        """Entries of each slot's page table that the ranks have."""

    def encode(self, plan: StepPlan, adapters: Mapping[Digest, int]) -> Step:
        """``adapters``: the numbers of the loaded ones. Conflict when one is not loaded; then nothing has changed."""
        rows, known = plan.rows, self._known
        # Column by column, without a call for each row: this is on the way of every step.
        try:
            numbers = [_NO_ADAPTER if (digest := row.adapter) is None else adapters[digest] for row in rows]
        except KeyError as error:
            raise Conflict(f"adapter {error.args[0]} is not loaded") from None
        for start in plan.starts:
            known[start.slot] = 0
        new_pages: list[int] = []
        for place in [place for place, row in enumerate(rows) if len(row.pages) != known[row.slot]]:
            slot, table = rows[place].slot, rows[place].pages
            new = table[known[slot] :]
            new_pages += (place, len(new), *new)
            known[slot] = len(table)
        values = [*[row.slot for row in rows], *[row.start for row in rows], *numbers]
        samples = [row.samples for row in rows]
        decoded = _one_token_each(rows) if all(samples) else None
        if decoded is not None:
            values += decoded
        else:
            values += [len(row.token_ids) for row in rows]
            values += map(int, samples)
            values += chain.from_iterable([row.token_ids for row in rows])
        return Step(plan.step_id, plan.releases, plan.starts, len(rows), decoded is not None, values, new_pages)


def _one_token_each(rows: Sequence[Row]) -> list[int] | None:
    """None: some have more."""
    try:
        return [token_id for (token_id,) in [row.token_ids for row in rows]]
    except ValueError:
        return None


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
        pages, digests, values, num_rows = self._pages, self._digests, step.values, step.num_rows
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
        new_pages, at = step.new_pages, 0
        while at < len(new_pages):
            first, end = at + 2, at + 2 + new_pages[at + 1]
            pages[slots[new_pages[at]]] += new_pages[first:end]
            at = end
        rows = [
            Row(
                slot=slot,
                token_ids=token_ids,
                start=position,
                pages=pages[slot],
                adapter=digests[number],
                samples=draws,
            )
            for slot, token_ids, position, number, draws in zip(
                slots, tokens, column(1), column(2), samples, strict=True
            )
        ]
        return StepPlan(step_id=step.step_id, releases=step.releases, starts=step.starts, rows=tuple(rows))
