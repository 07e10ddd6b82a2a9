"""What a trace format is: its columns and how they become ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """A format is recognised by having all ``required`` columns and no unknown one."""

    name: str
    about: str
    """Source and licence, one line."""
    required: Mapping[str, pa.DataType]
    """Type as which a column is read: CSV and JSON do not tell, Parquet columns are cast."""
    optional: Mapping[str, pa.DataType] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    """Known and not needed."""
    to_rows: Callable[[pa.Table], dict[str, pa.Array | pa.ChunkedArray]]
    """Columns of TRACE_SCHEMA by name, ``arrival_s`` among them: any clock; later all count from the first. A format of
    counts gives ``count``, too, and ``arrival_s`` is the start of the interval that was counted."""
    interval_s: float | None = None
    """Length of the counted interval; None: one row is one request."""
    in_order: bool = True
    """Whether the source promises rows by time. If not they are sorted."""

    @property
    def known(self) -> frozenset[str]:
        return frozenset(self.required) | frozenset(self.optional) | self.ignored

    def type_of(self, column: str) -> pa.DataType | None:
        """None: not read."""
        return self.required.get(column, self.optional.get(column))
