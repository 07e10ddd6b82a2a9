"""BurstGPT: ChatGPT and GPT-4 calls of a campus; the model stands for the adapter."""

import pyarrow as pa

from loraplex.traces.convert.format import TraceFormat


def _to_rows(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {
        "arrival_s": table.column("Timestamp"),
        "adapter_name": table.column("Model"),
        "prompt_tokens": table.column("Request tokens"),
        "output_tokens": table.column("Response tokens"),
    }


BURSTGPT = TraceFormat(
    name="burstgpt",
    about="HPMLL/BurstGPT, BurstGPT_*.csv, CC-BY-4.0; failed calls have 0 output tokens",
    required={
        "Timestamp": pa.float64(),
        "Model": pa.string(),
        "Request tokens": pa.int32(),
        "Response tokens": pa.int32(),
    },
    ignored=frozenset({"Total tokens", "Log Type", "Session ID", "SessionID", "Elapsed time"}),
    to_rows=_to_rows,
)
