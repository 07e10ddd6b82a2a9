"""The engine's table: many loads on one loaded model, in turns, written after each so that a stopped sweep goes on.

The cases of a round follow one another and the rounds repeat, so that whatever drifts hits all cases alike; cases are
compared by the median of their ratios within a round. Called by ``loraplex bench sweep`` and ``python -m
loraplex.bench sweep``.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec

from loraplex.bench.cases import SINGLE_TTFT, chosen_cases
from loraplex.bench.commit import source_commit
from loraplex.bench.options import EngineLoad, EngineSetup
from loraplex.bench.plot import bar_chart
from loraplex.bench.results import LoadResult, SweepRow, SweepSummary, SweepTable
from loraplex.bench.session import BenchSession
from loraplex.bench.single_ttft import measure_single_ttft
from loraplex.bench.whole_file import write_whole
from loraplex.core.errors import BadConfig

_TTFT_REPEATS = 15


class SweepOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    setup: EngineSetup
    cases: tuple[str, ...] = ()
    """Names of ``loraplex.bench.cases``; none: all. The others are compared with the first."""
    rounds: Annotated[int, msgspec.Meta(ge=1)] = 1
    budget_s: float | None = None
    """No case starts later than this after the start of the sweep, loading included."""
    shrink: Annotated[int, msgspec.Meta(ge=1)] = 1


def run_sweep(options: SweepOptions, out: Path, *, say: Callable[[str], None]) -> SweepTable:
    """Runs what ``out`` does not hold yet. Raises BadConfig (unknown case; ``out`` is of another set-up)."""
    started_s = time.monotonic()
    cases = chosen_cases(options.cases, options.shrink)
    table = _read(out, options)
    table.left = []
    done = {(row.case, row.round) for row in table.rows}
    todo = [
        (name, load, round_)
        for round_ in range(options.rounds)
        for name, load in cases.items()
        if (name, round_) not in done and (load is not None or (table.single_ttft is None and round_ == 0))
    ]
    session: BenchSession | None = None
    try:
        for name, load, round_ in todo:
            if options.budget_s is not None and time.monotonic() - started_s > options.budget_s:
                table.left.append(f"{name} (round {round_ + 1})")
                continue
            if session is None:
                session = BenchSession(options.setup)
                table.machine = session.machine
            if load is None:
                kind = EngineLoad(input_tokens=max(1, 256 // options.shrink))
                table.single_ttft = measure_single_ttft(session, kind, max(1, _TTFT_REPEATS // options.shrink))
                say(f"{name}: done")
            else:
                row = _row(name, round_, session.run(load))
                table.rows.append(row)
                say(f"{name}: {row.output_tokens_per_s:,.0f} tok/s, eta {row.eta:.3f}")
            _write(out, table, list(cases))
    finally:
        if session is not None:
            session.close()
    _write(out, table, list(cases))
    return table


def _row(case: str, round_: int, result: LoadResult) -> SweepRow:
    load = result.load
    return SweepRow(
        case=case,
        round=round_,
        adapters=load.adapters,
        requests=load.requests,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        lora_rank=max(load.lora_ranks) if load.adapters else 0,
        output_tokens_per_s=result.output_tokens_per_s,
        ttft_ms=1e3 * result.ttft_s.p50,
        tpot_ms=None if result.tpot_s is None else 1e3 * result.tpot_s.p50,
        eta=result.eta.eta,
        result=result,
    )


def summarize(rows: list[SweepRow], cases: list[str]) -> list[SweepSummary]:
    """In the order of ``cases``; those without a row are left out."""
    rates = {(row.case, row.round): row.output_tokens_per_s for row in rows}
    loads = [case for case in cases if case != SINGLE_TTFT]
    summary = []
    for case in loads:
        own = [row for row in rows if row.case == case]
        if not own:
            continue
        ratios = [row.output_tokens_per_s / rates[loads[0], row.round] for row in own if (loads[0], row.round) in rates]
        tpots = [row.tpot_ms for row in own if row.tpot_ms is not None]
        summary.append(
            SweepSummary(
                case=case,
                rounds=len(own),
                adapters=own[0].adapters,
                requests=own[0].requests,
                lora_rank=own[0].lora_rank,
                output_tokens_per_s=statistics.median(row.output_tokens_per_s for row in own),
                ttft_ms=statistics.median(row.ttft_ms for row in own),
                tpot_ms=statistics.median(tpots) if tpots else None,
                eta=statistics.median(row.eta for row in own),
                ratio=statistics.median(ratios) if ratios else None,
            )
        )
    return summary


def _read(out: Path, options: SweepOptions) -> SweepTable:
    if not out.exists():
        return SweepTable(setup=options.setup, shrink=options.shrink, commit=source_commit())
    table = SweepTable.load(out, param="out")
    if (table.setup, table.shrink, table.commit) != (options.setup, options.shrink, source_commit()):
        raise BadConfig(f"{out}: holds a sweep of another set-up or commit; choose another file", param="out")
    return table


def _write(out: Path, table: SweepTable, cases: list[str]) -> None:
    """The table and its plot, each whole at any time."""
    table.summary = summarize(table.rows, cases)
    encoded = msgspec.json.format(msgspec.json.encode(table), indent=1)
    bars = [(item.case, item.output_tokens_per_s, f"eta {item.eta:.2f}") for item in table.summary]
    name = "" if table.machine is None else table.machine.device_name
    plot = bar_chart(f"{table.setup.model} on {name}", "output tokens/s", bars).encode()
    write_whole(out, encoded)
    write_whole(out.with_suffix(".svg"), plot)
