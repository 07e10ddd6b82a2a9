"""ServeGen's clients: requests per ten minutes with the fit of their gaps. Clients stand for tenants."""

import pyarrow as pa
import pyarrow.compute as pc

from loraplex.traces.convert.format import TraceFormat


def _to_rows(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    client = pc.utf8_lpad(table.column("client").cast(pa.string()), 3, "0")
    return {
        "arrival_s": table.column("window_start_s"),
        "tenant": pc.binary_join_element_wise(table.column("pool"), client, "/c"),
        "adapter_name": table.column("pool"),
        "count": table.column("count"),
        "pattern": table.column("pattern"),
        "shape": table.column("param1"),
    }


SERVEGEN_WINDOWS = TraceFormat(
    name="servegen-windows",
    about="pool, client, window_start_s, count, pattern, param1: alibaba/ServeGen's fits, Apache-2.0",
    required={
        "pool": pa.string(),
        "client": pa.int32(),
        "window_start_s": pa.float64(),
        "count": pa.int64(),
        "pattern": pa.string(),
        "param1": pa.float64(),
    },
    ignored=frozenset({"iat_cv", "param2"}),
    to_rows=_to_rows,
    interval_s=600.0,
    in_order=False,
)
