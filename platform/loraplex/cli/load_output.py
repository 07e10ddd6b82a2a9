"""How a load report looks on the terminal. Called by ``replay`` and ``bench serve``."""

import dataclasses
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loraplex.cli.output import print_table, shown
from loraplex.core.errors import LoraplexError
from loraplex.loadgen.completion import Sample
from loraplex.loadgen.report import Latency, LoadReport
from loraplex.loadgen.targets import Assignment


class LoadProgress:
    """Answers and errors so far, on stderr; nothing when that is no terminal."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[errors]} errors"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._errors = 0
        self._task = self._progress.add_task("answers", total=total, errors=0)

    def __enter__(self) -> "LoadProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_sample(self, sample: Sample) -> None:
        self._errors += sample.error is not None
        self._progress.update(self._task, advance=1, errors=self._errors)


def report_json(report: LoadReport, assignments: Sequence[Assignment], settings: dict[str, Any]) -> dict[str, Any]:
    """The report, who stood for whom in the trace, and the settings of the run."""
    mapping = [
        {
            "trace_tenant": entry.trace_tenant,
            "trace_adapter": entry.trace_adapter,
            "tenant": entry.target.tenant,
            "model": entry.target.model,
            "requests": entry.requests,
        }
        for entry in assignments
    ]
    return {"settings": settings, **dataclasses.asdict(report), "assignments": mapping}


def print_report(report: LoadReport) -> None:
    """Latencies in milliseconds."""
    offered = "" if report.offered_rate_per_s is None else f" (offered {shown(report.offered_rate_per_s)}/s)"
    typer.echo(
        f"{shown(report.completed)} of {shown(report.requests)} requests in {shown(report.duration_s)} s: "
        f"{shown(report.completed_rate_per_s)}/s{offered}, {shown(report.output_tokens_per_s)} output tokens/s, "
        f"{shown(report.prompt_tokens)} prompt and {shown(report.output_tokens)} output tokens"
    )
    if report.slo is not None and report.slo.attainment is not None:
        typer.echo(
            f"SLO attainment {report.slo.attainment:.1%} (TTFT {report.slo.ttft_attainment:.1%}, "
            f"TPOT {report.slo.tpot_attainment:.1%}), goodput {shown(report.slo.goodput_per_s)}/s"
        )
    for error, count in report.errors.items():
        typer.echo(f"error {error}: {shown(count)} x {report.error_examples[error]}")
    rows = [
        _row("TTFT", report.ttft_s),
        _row("TPOT", report.tpot_s),
        _row("ITL", report.itl_s),
        _row("E2E", report.e2e_s),
        _row("send lag", report.send_lag_s),
    ]
    print_table(["ms", "count", "mean", "p50", "p90", "p95", "p99", "max"], [row for row in rows if row])
    if report.client_cpu_ms_per_token is not None:
        typer.echo(f"client CPU: {shown(report.client_cpu_ms_per_token)} ms per token")
    if len(report.tenants) > 1:
        print_table(
            ["tenant", "requests", "errors", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "attainment"],
            [
                [
                    tenant.tenant,
                    tenant.requests,
                    tenant.errors,
                    *_ends(tenant.ttft_s),
                    *_ends(tenant.tpot_s),
                    None if tenant.slo is None else tenant.slo.attainment,
                ]
                for tenant in report.tenants
            ],
        )
    if len(report.targets) > 1:
        print_table(
            ["tenant", "model", "requests", "errors", "output tokens", "TTFT p50", "TTFT p99", "TPOT p50", "E2E p99"],
            [
                [
                    target.tenant,
                    target.model,
                    target.requests,
                    target.errors,
                    target.output_tokens,
                    None if target.ttft_s is None else 1000 * target.ttft_s.p50,
                    None if target.ttft_s is None else 1000 * target.ttft_s.p99,
                    None if target.tpot_s is None else 1000 * target.tpot_s.p50,
                    None if target.e2e_s is None else 1000 * target.e2e_s.p99,
                ]
                for target in report.targets
            ],
        )


def require_an_answer(report: LoadReport) -> None:
    """A run without a single answer is a failure of the command. Raises LoraplexError."""
    if report.requests and not report.completed:
        error, message = next(iter(report.error_examples.items()))
        raise LoraplexError(f"none of {report.requests} requests was answered; first error {error}: {message}")


def _ends(latency: Latency | None) -> list[float | None]:
    return [None, None] if latency is None else [1000 * latency.p50, 1000 * latency.p99]


def _row(name: str, latency: Latency | None) -> list[Any]:
    if latency is None:
        return []
    return [name, latency.count, *(1000 * value for value in dataclasses.astuple(latency)[1:])]
