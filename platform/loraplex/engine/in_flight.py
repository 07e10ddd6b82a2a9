"""One step between its planning and its result: turns shares into rows and keeps whose rows they are.

The counts of what is planned beyond what is done (``num_scheduled``, ``num_known``, ``num_in_flight`` of a sequence)
change here only. Called by ``engine``.
"""

from dataclasses import dataclass

from loraplex.core.step import PENDING, Row, RowStart, StepPlan
from loraplex.engine.sequence import Sequence

_PENDING_TOKEN = (PENDING,)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInFlight:
    plan: StepPlan
    sequences: tuple[Sequence, ...]
    """Of the rows of ``plan``, in their order."""
    starting: tuple[Sequence, ...]

    @classmethod
    def begin(cls, step_id: int, shares: dict[Sequence, int], releases: tuple[int, ...]) -> "StepInFlight":
        """``shares``: how many tokens of each request, sorted by adapter. Changes the sequences."""
        rows: list[Row] = []
        starts: list[RowStart] = []
        starting: list[Sequence] = []
        for sequence, count in shares.items():
            slot, start, token_ids = sequence.slot, sequence.num_scheduled, sequence.token_ids
            assert slot is not None, "a request without a slot was planned"
            if sequence.needs_start:
                assert sequence.num_known == len(token_ids), "a slot is opened while a token is not known yet"
                sequence.needs_start = False
                starting.append(sequence)
                starts.append(
                    RowStart(
                        slot=slot,
                        sampling=sequence.request.sampling,
                        token_ids=tuple(token_ids),
                        num_prompt_tokens=sequence.num_prompt,
                    )
                )
            if count > 1:
                row_tokens = tuple(token_ids[start : start + count])
            else:
                row_tokens = (token_ids[start],) if start < len(token_ids) else _PENDING_TOKEN
            end = start + count
            samples = end == sequence.num_known
            rows.append(
                Row(
                    slot=slot,
                    token_ids=row_tokens,
                    start=start,
                    pages=sequence.pages,
                    adapter=sequence.adapter,
                    samples=samples,
                )
            )
            sequence.num_scheduled = end
            sequence.num_in_flight += 1
            if samples:
                sequence.num_known += 1
        plan = StepPlan(step_id=step_id, releases=releases, starts=tuple(starts), rows=tuple(rows))
        return cls(plan=plan, sequences=tuple(shares), starting=tuple(starting))

    def undo(self) -> None:
        """It will have no result, nor will any step after it. Changes the sequences."""
        for row, sequence in zip(self.plan.rows, self.sequences, strict=True):
            sequence.num_scheduled -= len(row.token_ids)
            sequence.num_in_flight -= 1
            if row.samples:
                sequence.num_known -= 1
