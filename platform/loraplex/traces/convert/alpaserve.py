"""Arrival files of AlpaServe experiments: a time and the index of a model, here an adapter ``m<index>``."""

import pyarrow as pa
import pyarrow.compute as pc

from loraplex.traces.convert.format import TraceFormat


def _to_rows(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    index = table.column("model").cast(pa.string())
    return {"arrival_s": table.column("t"), "adapter_name": pc.binary_join_element_wise("m", index, "")}


ALPASERVE = TraceFormat(
    name="alpaserve",
    about="t seconds, model index: arrivals of alpa-projects/mms experiments, Apache-2.0 (OSDI'23)",
    required={"t": pa.float64(), "model": pa.int32()},
    to_rows=_to_rows,
)
