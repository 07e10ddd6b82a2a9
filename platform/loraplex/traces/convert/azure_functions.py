"""Azure Functions traces: functions stand for adapters, their owners (2021: applications) for tenants.

2019 counts invocations per minute, one row a function and a day, or the same as (function, minute, count); 2021 logs
each invocation by its end.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loraplex.traces.convert.format import TraceFormat

_MINUTES_OF_A_DAY = [str(minute) for minute in range(1, 1441)]


def _minute_rows(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {
        "arrival_s": pc.multiply(table.column("minute"), 60.0),
        "tenant": table.column("owner"),
        "adapter_name": table.column("function"),
        "count": table.column("count"),
    }


def _day_rows(table: pa.Table) -> dict[str, pa.Array | pa.ChunkedArray]:
    present = [minute for minute in _MINUTES_OF_A_DAY if minute in table.column_names]
    counts = np.stack([pc.fill_null(table.column(minute), 0).to_numpy() for minute in present], axis=1)
    function, position = np.nonzero(counts)
    minute = np.array([int(minute) - 1 for minute in present])
    taken = pa.array(function)
    return {
        "arrival_s": pa.array(minute[position] * 60.0),
        "tenant": table.column("HashOwner").take(taken),
        "adapter_name": table.column("HashFunction").take(taken),
        "count": pa.array(counts[function, position]),
    }


def _invocation_rows(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    started_s = pc.subtract(table.column("end_timestamp"), table.column("duration"))
    return {
        "arrival_s": pc.max_element_wise(started_s, 0.0),  # some began before the log
        "tenant": table.column("app"),
        "adapter_name": table.column("func"),
    }


MAF_MINUTES = TraceFormat(
    name="maf-minutes",
    about="Azure Functions 2019 as function, minute, count, owner: Azure/AzurePublicDataset, CC-BY-4.0 (ATC'20)",
    required={"function": pa.string(), "minute": pa.int32(), "count": pa.int64(), "owner": pa.string()},
    optional={"trigger": pa.string()},
    ignored=frozenset({"app"}),
    to_rows=_minute_rows,
    interval_s=60.0,
    in_order=False,
)
MAF_DAY = TraceFormat(
    name="maf-day",
    about="Azure Functions 2019, invocations_per_function_md.anon.d*.csv: Azure/AzurePublicDataset, CC-BY-4.0 (ATC'20)",
    required={"HashOwner": pa.string(), "HashFunction": pa.string()},
    optional={"Trigger": pa.string()} | {minute: pa.int64() for minute in _MINUTES_OF_A_DAY},
    ignored=frozenset({"HashApp"}),
    to_rows=_day_rows,
    interval_s=60.0,
    in_order=False,
)
MAF_2021 = TraceFormat(
    name="maf-2021",
    about="Azure Functions 2021, AzureFunctionsInvocationTrace*.txt: Azure/AzurePublicDataset, CC-BY-4.0 (SOSP'21)",
    required={
        "app": pa.string(),
        "func": pa.string(),
        "end_timestamp": pa.float64(),
        "duration": pa.float64(),
    },
    to_rows=_invocation_rows,
    in_order=False,
)
