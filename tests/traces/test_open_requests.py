"""What arrived and has not ended, against a plain model."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from loraplex.traces.open_requests import OpenRequests
from loraplex.traces.row import ArrivalRow
from loraplex.traces.schema import ARRIVAL_SCHEMA, TRACE_SCHEMA, rows_to_batch, to_trace_schema


def _row(number: int) -> ArrivalRow:
    """Two of the same id, as clients may choose, are two requests."""
    return ArrivalRow(
        arrival_s=1e9 + number,
        tenant="acme",
        request_id=f"r{number % 3}",
        base_model_id="base",
        adapter_name=None if number % 2 else "pirate",
        prompt_tokens=number,
    )


def _table(numbers: list[int]) -> pa.Table:
    batch = rows_to_batch([_row(number) for number in numbers], ARRIVAL_SCHEMA)
    return to_trace_schema(pa.Table.from_batches([batch]), where="test")


_EVENTS = st.lists(st.tuples(st.sampled_from(["add", "end", "forget"]), st.sets(st.integers(0, 40), max_size=6)))


@given(_EVENTS)
def test_open_is_what_was_added_and_neither_ended_nor_forgotten(events: list[tuple[str, set[int]]]) -> None:
    requests = OpenRequests(max_requests=10)
    model: list[int] = []
    for kind, numbers in events:
        if kind == "add":
            fresh = sorted(numbers - set(model))
            requests.add(_table(fresh))
            model = [*model, *fresh][-10:]
        elif kind == "end":
            requests.end(_table(sorted(numbers)))
            model = [number for number in model if number not in numbers]
        else:
            before = min(numbers, default=0)
            requests.forget(1e9 + before)
            while model and model[0] < before:
                model.pop(0)
        table = requests.table()
        assert table.schema == TRACE_SCHEMA
        assert table.column("prompt_tokens").to_pylist() == model
        assert len(requests) == len(model)
        assert table.column("e2e_s").null_count == len(model)
