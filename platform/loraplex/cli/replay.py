"""``loraplex replay``: a trace as open-loop load."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from loraplex.cli.connection import DEFAULT_KEY_FILE, JsonOption, KeyOption, UrlOption, load_targets
from loraplex.cli.load_output import LoadProgress, print_report, report_json, require_an_answer
from loraplex.cli.output import print_json
from loraplex.cli.replay_expected import Expected, Simulator, comparison_json, print_comparison
from loraplex.core.errors import BadConfig, NotFound
from loraplex.loadgen.comparison import compare
from loraplex.loadgen.completion import CompletionClient, Sample
from loraplex.loadgen.config import Endpoint, ReplayConfig, RequestConfig
from loraplex.loadgen.file_limit import allow_streams
from loraplex.loadgen.http_client import HttpClient
from loraplex.loadgen.open_loop import run_open_loop
from loraplex.loadgen.outcomes import Outcomes
from loraplex.loadgen.page import replay_page
from loraplex.loadgen.prompts import PromptMaker, TokenizerPrompts, WordPrompts
from loraplex.loadgen.report import LoadReport, summarize
from loraplex.loadgen.schedule import PlannedRequest, plan_replay
from loraplex.loadgen.targets import Assignment, assign_targets
from loraplex.traces.arrivals import load_requests

_PROMPT_TOLERANCE = 0.1


def replay_command(
    trace: Annotated[str, typer.Argument(help="A trace file, a folder of them, a glob or a pyarrow.fs URL.")],
    speed: Annotated[float, typer.Option(help="2: twice as fast as recorded.")] = 1.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of sending; default: the whole trace.")] = None,
    requests: Annotated[int | None, typer.Option(help="Only the first requests.")] = None,
    keys: Annotated[
        Path, typer.Option("--keys", "--demo-file", help="Key file with tenants, their keys and models.")
    ] = DEFAULT_KEY_FILE,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Only these models; may be repeated.")
    ] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which API.")] = Endpoint.COMPLETIONS,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model directory whose tokenizer.json makes prompts exact to the token.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="For rows that do not say.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="For rows that do not say.")] = 64,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Cut longer prompts.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Cut longer answers.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers as long as recorded.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    slo: Annotated[str | None, typer.Option(help='Targets, e.g. "ttft=500ms,tpot=50ms": reports who met them.')] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report as an HTML page to this file, too.")] = None,
    against_simulation: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="Simulate the same requests through this plan; needs --fleet.")
    ] = None,
    fleet: Annotated[
        Path | None, typer.Option(help="Fleet file of the simulation: cost profiles, adapter ranks, engine.")
    ] = None,
    simulator: Annotated[Simulator, typer.Option(help="exact: some hundred requests a second.")] = Simulator.EXACT,
    url: UrlOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file, too.")] = None,
) -> None:
    """Send a trace back as open-loop load and report latencies.

    Every request goes out at its recorded time, whatever the server does; latencies count from that time.
    """
    replay = ReplayConfig(
        speed=speed,
        duration_s=duration,
        max_requests=requests,
        default_prompt_tokens=prompt_tokens,
        default_output_tokens=output_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
    )
    config = RequestConfig(endpoint=endpoint, ignore_eos=ignore_eos, timeout_s=timeout, seed=seed)
    for option, path in (("--out", out), ("--report", report)):
        if path is not None and not path.absolute().parent.is_dir():
            raise NotFound(f"{option} {path}: no directory {path.absolute().parent}")
    expected = Expected.of(slo=slo, plan=against_simulation, fleet=fleet, simulator=simulator)
    base_url, targets = load_targets(url, key, keys, model or [])
    rows = load_requests(trace, duration_s=None if duration is None else duration * speed, limit=requests)
    assignments = assign_targets(rows, targets)
    schedule = plan_replay(rows, assignments, replay)
    if not schedule:
        raise BadConfig(f"no request of {trace} falls into the first {duration} s")
    # Before a request is sent: what is wrong with plan or fleet shows at once.
    predicted = expected.predict(schedule)
    prompts: PromptMaker = WordPrompts(seed=seed) if tokenizer is None else TokenizerPrompts(tokenizer, seed=seed)
    _say_who_stands_in(assignments)
    allow_streams(len(schedule))
    cpu_s = time.process_time()
    samples = asyncio.run(_run(base_url, config, schedule, prompts))
    figures = summarize(samples, client_cpu_s=time.process_time() - cpu_s, slo=expected.slo)
    settings = {"trace": trace, "url": base_url, **msgspec.to_builtins(replay), **msgspec.to_builtins(config)}
    measured = Outcomes.of_samples(samples)
    result = report_json(figures, assignments, {**settings, "slo": slo})
    comparison = () if predicted is None else compare(measured, predicted, expected.slo)
    result["simulated"] = comparison_json(comparison) or None
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if report is not None:
        title = f"Replay of {trace}"
        report.write_text(
            replay_page(figures, measured, title=title, slo=expected.slo, predicted=predicted), encoding="utf-8"
        )
    if as_json:
        print_json(result)
    else:
        print_report(figures)
        if comparison:
            print_comparison(comparison)
        _say_prompt_lengths(schedule, figures)
    require_an_answer(figures)


def _say_who_stands_in(assignments: Sequence[Assignment]) -> None:
    """What the target does not have is asked of something else, which changes what is measured."""
    adapters = [one for one in assignments if one.trace_adapter is not None]
    missing = [one for one in adapters if one.target.model != one.trace_adapter]
    if missing:
        one = missing[0]
        typer.echo(
            f"{len(missing)} of the trace's {len(adapters)} adapters are not among the models to ask, others stand for "
            f"them: {one.target.tenant}/{one.target.model} for {one.trace_tenant}/{one.trace_adapter}"
            + (", ..." if len(missing) > 1 else ""),
            err=True,
        )


def _say_prompt_lengths(schedule: Sequence[PlannedRequest], figures: LoadReport) -> None:
    """A server whose tokenizer cuts words into many tokens got longer prompts than the trace has."""
    asked = sum(request.prompt_tokens for request in schedule) * figures.completed / len(schedule)
    if asked and abs(figures.prompt_tokens / asked - 1) > _PROMPT_TOLERANCE:
        typer.echo(
            f"the server counted {figures.prompt_tokens / asked:.1f} times the prompt tokens that were asked for: "
            "give its --tokenizer",
            err=True,
        )


async def _run(
    url: str, config: RequestConfig, schedule: tuple[PlannedRequest, ...], prompts: PromptMaker
) -> list[Sample]:
    http = HttpClient(url, connect_timeout_s=config.connect_timeout_s)
    try:
        with LoadProgress(len(schedule)) as progress:
            return await run_open_loop(schedule, CompletionClient(http, config), prompts, on_sample=progress.on_sample)
    finally:
        http.close()
