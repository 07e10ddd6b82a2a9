"""The requests that arrived and have not ended, as far as gateways have told. Owned by the writer; not thread-safe."""

from itertools import islice

import pyarrow as pa

from loraplex.traces.row import ArrivalRow
from loraplex.traces.schema import ARRIVAL_SCHEMA, request_keys, rows_to_batch, to_trace_schema


class OpenRequests:
    def __init__(self, *, max_requests: int) -> None:
        """``max_requests``: beyond it the oldest are forgotten."""
        self._max_requests = max_requests
        self._open: dict[tuple[float, str | None], ArrivalRow] = {}
        """By arrival and request id, in the order in which they were told."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, arrivals: pa.Table) -> None:
        """[N] in TRACE_SCHEMA. Changes state."""
        for row in arrivals.select(ARRIVAL_SCHEMA.names).to_pylist():
            self._open[row["arrival_s"], row["request_id"]] = ArrivalRow(**row)
        for key in list(islice(self._open, max(0, len(self._open) - self._max_requests))):
            del self._open[key]

    def end(self, rows: pa.Table) -> None:
        """[N] in TRACE_SCHEMA, of which some may not be known here. Changes state."""
        for key in request_keys(rows):
            self._open.pop(key, None)

    def forget(self, before_s: float) -> None:
        """Those told first that arrived before this Unix time: their gateway has died. Changes state."""
        while self._open:
            oldest = next(iter(self._open))
            if oldest[0] >= before_s:
                return
            del self._open[oldest]

    def table(self) -> pa.Table:
        """[len(self)] in TRACE_SCHEMA; null is what their end will tell."""
        batch = rows_to_batch(list(self._open.values()), ARRIVAL_SCHEMA)
        return to_trace_schema(pa.Table.from_batches([batch]), where="open requests")
