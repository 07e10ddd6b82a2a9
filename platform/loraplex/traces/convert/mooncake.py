"""Mooncake: one hour of Kimi, timestamps in milliseconds; the hashes of its prompt blocks are not kept."""

import pyarrow as pa
import pyarrow.compute as pc

from loraplex.traces.convert.format import TraceFormat


def _to_rows(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {
        "arrival_s": pc.divide(table.column("timestamp"), 1000.0),
        "prompt_tokens": table.column("input_length"),
        "output_tokens": table.column("output_length"),
    }


MOONCAKE = TraceFormat(
    name="mooncake",
    about="kvcache-ai/Mooncake, *_trace.jsonl, Apache-2.0",
    required={"timestamp": pa.float64(), "input_length": pa.int32(), "output_length": pa.int32()},
    ignored=frozenset({"hash_ids"}),
    to_rows=_to_rows,
)
