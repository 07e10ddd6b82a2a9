"""Azure LLM inference traces of 2023 and 2024: logged requests with lengths, no tenant and no model."""

import pyarrow as pa

from loraplex.traces.convert.clock import unix_seconds
from loraplex.traces.convert.format import TraceFormat


def _to_rows(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {
        "arrival_s": unix_seconds(table.column("TIMESTAMP")),
        "prompt_tokens": table.column("ContextTokens"),
        "output_tokens": table.column("GeneratedTokens"),
    }


AZURE_LLM = TraceFormat(
    name="azure-llm",
    about="Azure/AzurePublicDataset, AzureLLMInferenceTrace_*.csv, CC-BY-4.0 (Splitwise, ISCA'24; DynamoLLM, HPCA'25)",
    required={"TIMESTAMP": pa.string(), "ContextTokens": pa.int32(), "GeneratedTokens": pa.int32()},
    to_rows=_to_rows,
)
