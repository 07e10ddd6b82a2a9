"""Loads of the engine's table in several shapes of a group, beside one another: ``python -m loraplex.bench shapes FILE
SWEEP...`` joins the tables of ``sweep``, one for each shape, of one model on machines of one kind.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from loraplex.bench.results import SweepTable
from loraplex.core.errors import BadConfig


class ShapeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One load: all its requests were submitted at once."""

    gpu: str
    tp: int
    pp: int
    batch: int
    """Requests."""
    adapters: int
    """Distinct ones; 0: the plain base."""
    step_ms: float
    """Mean time between the ends of steps without prompts. With several stages each has its share of the batch."""
    decode_tokens_per_s: float
    """Of these steps."""
    output_tokens_per_s: float
    """Of the whole load, prompts included."""
    ttft_ms: float
    tpot_ms: float | None
    """Medians over the requests."""


class ShapeRows(msgspec.Struct, frozen=True, kw_only=True):
    machine: str
    model: str
    input_tokens: int
    output_tokens: int
    """Of each request."""
    rows: tuple[ShapeRow, ...]


def join_sweeps(files: Sequence[Path]) -> ShapeRows:
    """The tables in ``files``, medians where a case ran several times. BadConfig when one is of another model, machine
    or length, or no table at all."""
    tables = [SweepTable.load(file, param="sweep") for file in files]
    sources = {_source(table, file) for table, file in zip(tables, files, strict=True)}
    if len(sources) != 1:
        raise BadConfig(f"the tables are not of one model, machine and length: {sorted(sources)}", param="sweep")
    ((machine, model, input_tokens, output_tokens),) = sources
    rows = tuple(_row(table, case) for table in tables for case in dict.fromkeys(row.case for row in table.rows))
    return ShapeRows(machine=machine, model=model, input_tokens=input_tokens, output_tokens=output_tokens, rows=rows)


def _source(table: SweepTable, file: Path) -> tuple[str, str, int, int]:
    lengths = {(row.input_tokens, row.output_tokens) for row in table.rows}
    if table.machine is None or len(lengths) != 1:
        raise BadConfig(f"{file}: no loads of one length in it", param="sweep")
    machine = f"{table.machine.device_name}, torch {table.machine.torch_version}"
    return (machine, table.setup.model, *lengths.pop())


def _row(table: SweepTable, case: str) -> ShapeRow:
    found = [row for row in table.rows if row.case == case]
    # Of several rounds the one in the middle, so that its figures belong together.
    row = sorted(found, key=lambda row: row.output_tokens_per_s)[len(found) // 2]
    decode = row.result.eta.decode
    assert table.machine is not None, "checked before"
    assert decode is not None, "every load decodes"
    return ShapeRow(
        gpu=table.machine.device_name,
        tp=table.setup.tp,
        pp=table.setup.pp,
        batch=row.requests,
        adapters=row.adapters,
        step_ms=1e3 * decode.measured_s / decode.steps,
        decode_tokens_per_s=decode.tokens / decode.measured_s,
        output_tokens_per_s=row.output_tokens_per_s,
        ttft_ms=row.ttft_ms,
        tpot_ms=row.tpot_ms,
    )
