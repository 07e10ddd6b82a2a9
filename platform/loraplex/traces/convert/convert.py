"""A public trace as one of ours: read, map, sort, spread counts, fill in lengths, write; all of it a stream."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loraplex.core.errors import BadConfig, InvalidInput, NotFound
from loraplex.traces.arrivals import Window, trace_zero_s
from loraplex.traces.convert.catalog import choose_format
from loraplex.traces.convert.counts import CountSpreader, Spread, count_table
from loraplex.traces.convert.format import TraceFormat
from loraplex.traces.convert.mapping import AdapterMapping, MappingStrategy
from loraplex.traces.convert.raw import RawFile
from loraplex.traces.names import NameTable, column_indices, pair_indices
from loraplex.traces.order import in_arrival_order, require_valid_rows
from loraplex.traces.reader import read_traces
from loraplex.traces.schema import to_trace_schema
from loraplex.traces.sink import TraceSink
from loraplex.traces.sort import sort_by_arrival
from loraplex.traces.synth.lengths import LengthSampler, Limits, parse_lengths

_TRIGGERS = ("trigger", "Trigger")


class ConvertOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str | None = None
    """None: recognised by its columns."""
    ignore_columns: tuple[str, ...] = ()
    exclude_triggers: tuple[str, ...] = ()
    """Of Azure functions: leave out those of these triggers, such as ``timer``."""
    adapters: int | None = None
    """Map the functions (adapters) of the source to this many; None: keep them."""
    mapping: MappingStrategy = MappingStrategy.STRIPE
    window: Window | None = None
    """Only this part, which then starts at second 0."""
    spread: Spread = Spread.UNIFORM
    cv: float = 1.0
    """Of ``spread`` gamma."""
    count_scale: float = 1.0
    """Multiplies the counts of a format of counts."""
    speed: float = 1.0
    """2: twice as fast as recorded."""
    base_model: str | None = None
    """Named in every row that names none."""
    lengths: str | None = None
    """For rows that lack one, as ``parse_lengths`` takes it."""
    sort: bool = False
    """Sort rows that are out of order instead of refusing them."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("adapters", "count_scale", "speed", "cv"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and np.isfinite(value)):
                raise BadConfig(f"{name} is {value}, must be greater than 0", param=name)
        if self.window is not None and not 0 <= self.window.start_s < self.window.end_s:
            raise BadConfig(f"window {self.window.start_s}:{self.window.end_s} is empty", param="window")


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    format: str
    rows: int


def convert(source: str, out: str | os.PathLike[str], options: ConvertOptions) -> Converted:
    """Writes ``out``. Raises NotFound, InvalidInput and BadConfig naming the file, its row or column, or the option."""
    reader = _Source(source, options)
    sampler = None
    if options.lengths is not None:
        sampler = parse_lengths(options.lengths, seed=options.seed, limits=Limits())
    finish = _Finish(options, sampler)
    with TraceSink(out) as sink:
        for table in reader.requests():
            sink.write(finish.apply(table))
        if not sink.rows:
            raise NotFound(f"{source}: no rows to convert")
    return Converted(format=reader.format_name, rows=sink.rows)


class _Source:
    """A file in a foreign format, or files in ours (``trace``), as requests in order of time."""

    def __init__(self, path: str, options: ConvertOptions) -> None:
        self._path = path
        self._options = options
        self._raw: RawFile | None = None
        self._format: TraceFormat | None = None
        if options.format != "trace" and (options.format is not None or not _is_trace(path)):
            self._raw = RawFile(path)
            extra = frozenset(options.ignore_columns)
            self._format = choose_format(self._raw.columns(), name=options.format, extra=extra, where=path)
        self._counted = self._format is not None and self._format.interval_s is not None
        columns = [] if self._raw is None else self._raw.columns()
        if options.exclude_triggers and not set(_TRIGGERS) & set(columns):
            raise BadConfig(f"{path} has no column of triggers to exclude", param="exclude_triggers")
        if options.spread is not Spread.UNIFORM and not self._counted:
            raise BadConfig(f"format {self.format_name} has no counts to spread", param="spread")

    @property
    def format_name(self) -> str:
        return "trace" if self._format is None else self._format.name

    def requests(self) -> Iterator[pa.Table]:
        """In TRACE_SCHEMA, from second 0."""
        options = self._options
        tables = self._in_file_order()
        if options.adapters is not None:
            mapping = AdapterMapping(self._in_file_order(), adapters=options.adapters, strategy=options.mapping)
            tables = map(mapping.apply, tables)
        if options.sort or (self._format is not None and not self._format.in_order):
            tables = sort_by_arrival(tables)
        else:
            tables = in_arrival_order(tables, where=self._path)
        tables = _within(tables, options.window or Window())
        if not self._counted:
            return tables
        assert self._format is not None
        assert self._format.interval_s is not None
        spreader = CountSpreader(
            interval_s=self._format.interval_s,
            spread=options.spread,
            cv=options.cv,
            scale=options.count_scale,
            seed=options.seed,
        )
        return spreader.requests(tables)

    def _in_file_order(self) -> Iterator[pa.Table]:
        """In TRACE_SCHEMA or, counted, in COUNT_SCHEMA."""
        if self._raw is None or self._format is None:
            yield from read_traces(self._path)
            return
        present = self._raw.columns()
        types = {name: wanted for name in present if (wanted := self._format.type_of(name)) is not None}
        first_row = 0
        for raw in self._raw.tables(types):
            try:
                known = self._format.to_rows(self._without_triggers(raw))
            except pa.ArrowException as error:
                raise InvalidInput(f"{self._path}: {error}", code="invalid_trace") from error
            if self._counted:
                table = count_table(known, where=self._path)
            else:
                table = to_trace_schema(pa.table(known), where=self._path)
                require_valid_rows(table, where=self._path, first_row=first_row)
            first_row += raw.num_rows
            if table.num_rows:
                yield table

    def _without_triggers(self, raw: pa.Table) -> pa.Table:
        for name in _TRIGGERS:
            if self._options.exclude_triggers and name in raw.column_names:
                excluded = pa.array(self._options.exclude_triggers, pa.string())
                raw = raw.filter(pc.invert(pc.is_in(raw.column(name), excluded)))
        return raw


def _is_trace(path: str) -> bool:
    """A folder, a pattern, or a Parquet file: what ``read_traces`` takes, unless its columns are another format's."""
    if "://" not in path and not os.path.isfile(path):
        return True
    if not path.endswith(".parquet"):
        return False
    columns = RawFile(path).columns()
    return "arrival_s" in columns or "timestamp_s" in columns


def _within(tables: Iterator[pa.Table], window: Window) -> Iterator[pa.Table]:
    """Rows of ``window``, counted from its start."""
    zero_s: float | None = None
    for table in tables:
        times_s = table.column("arrival_s").to_numpy()
        if zero_s is None:
            zero_s = trace_zero_s(float(times_s[0]))
        times_s = times_s - zero_s
        first, last = np.searchsorted(times_s, window, side="left")
        if first < last:
            since_start = pa.array(times_s[first:last] - window.start_s)
            yield table.slice(first, last - first).set_column(0, table.schema.field(0), since_start)
        if last < len(times_s):
            return


class _Finish:
    """Final speed, and base model and lengths where a row has none."""

    def __init__(self, options: ConvertOptions, sampler: LengthSampler | None) -> None:
        self._options = options
        self._sampler = sampler
        self._tenants, self._adapters = NameTable[str](), NameTable[str]()
        self._pairs = NameTable[tuple[int, int]]()
        """(tenant, adapter) in order of appearance: the index chooses the length distribution."""

    def apply(self, table: pa.Table) -> pa.Table:
        changed = {}
        if self._options.speed != 1:
            changed["arrival_s"] = pc.divide(table.column("arrival_s"), self._options.speed)
        if self._options.base_model is not None:
            bases = table.column("base_model_id").cast(pa.string())
            changed["base_model_id"] = pc.fill_null(bases, self._options.base_model).dictionary_encode()
        if self._sampler is not None:
            tenant = column_indices(table.column("tenant"), self._tenants)
            adapter = column_indices(table.column("adapter_name"), self._adapters)
            drawn = self._sampler.draw(pair_indices(tenant, adapter, self._pairs))
            for name, tokens in zip(("prompt_tokens", "output_tokens"), drawn, strict=True):
                changed[name] = pc.coalesce(table.column(name), pa.array(tokens))
        for name, column in changed.items():
            index = table.column_names.index(name)
            table = table.set_column(index, table.schema.field(index), column)
        return table
