"""The schema in which public traces are passed on: ``timestamp_s`` (or ``arrival_s``), tenant, adapter, lengths."""

import pyarrow as pa

from loraplex.traces.convert.format import TraceFormat

_OURS = {"timestamp_s": "arrival_s", "adapter": "adapter_name"}
_LABELS = {name: pa.string() for name in ("tenant", "adapter", "adapter_name", "base_model_id")}
_COUNTS = {"prompt_tokens": pa.int32(), "output_tokens": pa.int32()}


def _to_rows(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {_OURS.get(name, name): table.column(name) for name in table.column_names}


PUBLIC = TraceFormat(
    name="public",
    about="timestamp_s, tenant, adapter, prompt_tokens, output_tokens: the common schema of public traces",
    required={"timestamp_s": pa.float64()},
    optional=_LABELS | _COUNTS,
    to_rows=_to_rows,
)
PLAIN = TraceFormat(
    name="plain",
    about="arrival_s, tenant, base_model_id, adapter_name, prompt_tokens, output_tokens: our names for the same",
    required={"arrival_s": pa.float64()},
    optional=_LABELS | _COUNTS,
    to_rows=_to_rows,
)
