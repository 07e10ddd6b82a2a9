"""``loraplex trace ...``: traffic, recorded or made up, in numbers, pictures and files."""

from collections.abc import Sequence
from typing import Annotated

import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table, shown, shown_time
from loraplex.cli.trace_convert import convert_command
from loraplex.cli.trace_plot import plot_command
from loraplex.cli.trace_split import split_command
from loraplex.cli.trace_synth import synth_command
from loraplex.traces.stats import Distribution, GroupStats, Skew, TraceStats, trace_stats

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Look at traffic; make, convert and split traces.")


@app.callback()
def trace() -> None:
    """Look at traffic; make, convert and split traces."""


app.command("synth")(synth_command)
app.command("convert")(convert_command)
app.command("split")(split_command)
app.command("plot")(plot_command)


@app.command("stats")
def stats(
    path: Annotated[str, typer.Argument(help="A trace file, a folder of them, a glob or a pyarrow.fs URL.")],
    top: Annotated[int, typer.Option(min=0, help="How many of the busiest tenants and adapters to show.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Load, burstiness, skew, lengths and latencies of a trace."""
    found = trace_stats(path)
    if as_json:
        print_json(found)
        return
    _print_summary(found)
    rows = [
        _row("prompt tokens", found.prompt_tokens),
        _row("cached tokens", found.cached_tokens),
        _row("output tokens", found.output_tokens),
        _row("TTFT s", found.ttft_s),
        _row("TPOT s", found.tpot_s),
        _row("E2E s", found.e2e_s),
    ]
    typer.echo()
    print_table(["", "count", "mean", "p50", "p90", "p99", "max"], [row for row in rows if row])
    for title, groups in (("busiest tenants", found.by_tenant), ("busiest adapters", found.by_adapter)):
        if top and groups:
            typer.echo()
            _print_groups(title, groups[:top], with_adapter=groups is found.by_adapter)


def _print_summary(found: TraceStats) -> None:
    rate = "" if found.rate_per_s is None else f", {shown(found.rate_per_s)} per second"
    typer.echo(f"{shown(found.requests)} requests in {shown(found.span_s)} s{rate}")
    if found.start_s > 1e8:
        typer.echo(f"first at {shown_time(found.start_s)}")
    if found.gap_cv is not None:
        typer.echo(f"gaps between arrivals: CV {shown(found.gap_cv)} (Poisson: 1)")
    for word, skew in (("tenants", found.tenants), ("adapters", found.adapters)):
        typer.echo(_skew_line(word, skew))
    if found.statuses:
        counts = ", ".join(f"{status}: {shown(count)}" for status, count in found.statuses.items())
        typer.echo(f"status {counts}")


def _skew_line(word: str, skew: Skew) -> str:
    zipf = "" if skew.zipf is None else f", Zipf exponent {skew.zipf:.2f}"
    return (
        f"{shown(skew.distinct)} {word}: the busiest has {skew.top_share:.0%} of the requests, the busiest tenth "
        f"{skew.top_tenth_share:.0%}; Gini {skew.gini:.2f}{zipf}"
    )


def _row(name: str, values: Distribution | None) -> list[object]:
    if values is None:
        return []
    return [name, values.count, values.mean, values.p50, values.p90, values.p99, values.max]


def _print_groups(title: str, groups: Sequence[GroupStats], *, with_adapter: bool) -> None:
    columns = ["tenant", "adapter", "requests", "per s", "CV", "prompt", "output", "errors"]
    columns += ["TTFT p50 s", "TTFT p99 s", "E2E p50 s"]
    rows = [
        [
            group.tenant,
            group.adapter or "(base)",
            group.requests,
            group.rate_per_s,
            group.gap_cv,
            group.prompt_tokens,
            group.output_tokens,
            group.errors,
            group.ttft_p50_s,
            group.ttft_p99_s,
            group.e2e_p50_s,
        ]
        for group in groups
    ]
    if not with_adapter:
        columns.pop(1)
        for row in rows:
            row.pop(1)
    print_table(columns, rows, title=title)
