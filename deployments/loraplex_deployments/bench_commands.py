"""``loraplex bench serve`` and ``loraplex bench start``: options in, tables or JSON out. Found through the entry-point
group ``loraplex.commands``."""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from loraplex.cli.bench_engine import (
    DeviceOption,
    DtypeOption,
    PagesOption,
    PpOption,
    RunningOption,
    StepTokensOption,
    ThreadsOption,
    TpOption,
)
from loraplex.cli.connection import DEFAULT_KEY_FILE, JsonOption, KeyFileOption, KeyOption, load_targets
from loraplex.cli.load_output import require_an_answer
from loraplex.cli.output import print_json, print_table, shown
from loraplex.config.platform import DEMO_MODEL, ServeConfig
from loraplex.core.errors import BadConfig
from loraplex.loadgen.config import Endpoint, RequestConfig
from loraplex.loadgen.targets import Target

if TYPE_CHECKING:
    from loraplex_deployments.bench_results import ServeBenchResult

_RUNNING = "A running platform"
_STREAMS_PER_CLIENT = 64
_DEFAULT_PROXY = ServeConfig().proxy
ProxyOption = Annotated[str, typer.Option(help="What stands before the gateways: haproxy or python.")]


def serve_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="A Hugging Face directory, a .gguf file with --tokenizer, random:llama3-8b and the like, or demo: "
            "of the engine alone, and of the platform that is started unless one is named."
        ),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Requests in flight at a time.")] = 16,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many in all; default: one per stream, all sent at once.")
    ] = None,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Prompt tokens of each.")] = 256,
    output_tokens: Annotated[int, typer.Option("--output", min=1, help="Output tokens of each.")] = 128,
    adapters: Annotated[int, typer.Option(min=0, help="Random adapters, taken in turn; 0: the plain base.")] = 0,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank of each adapter.")] = 16,
    modules: Annotated[str, typer.Option(help="Projections with LoRA, e.g. q,k,v,o.")] = "all",
    single_ttft: Annotated[int, typer.Option(min=0, help="Also: this many lone requests in each turn.")] = 0,
    starts: Annotated[int, typer.Option(min=1, help="Times that both sides start anew.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side per start; figures are medians of all.")] = 3,
    gateways: Annotated[int, typer.Option(min=1, help="Gateway processes.")] = 1,
    clients: Annotated[
        int | None, typer.Option(min=1, help=f"Client processes; default: one per {_STREAMS_PER_CLIENT} streams.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    tp: TpOption = 1,
    pp: PpOption = 1,
    max_running: RunningOption = 256,
    max_step_tokens: StepTokensOption = 2048,
    num_pages: PagesOption = None,
    proxy: ProxyOption = _DEFAULT_PROXY,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the platform keeps its adapters for a next run; default: temporary.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Directory of the tokenizer, where --model has none or is not given: prompts to the token."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--http", "--url", envvar="LORAPLEX_URL", help="Address of one.", rich_help_panel=_RUNNING),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", "-m", help="Take turns over these; default: all it has.", rich_help_panel=_RUNNING),
    ] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which API.", rich_help_panel=_RUNNING)] = Endpoint.COMPLETIONS,
    ignore_eos: Annotated[
        bool, typer.Option(help="Answers of exactly --output tokens.", rich_help_panel=_RUNNING)
    ] = True,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 600.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Through Ray and HTTP, and the engine alone, in turns.

    With --model alone: starts a platform with that base and ends it. Without --model: the load goes to a running
    platform and the engine alone is not measured. With --model and --http: a running platform on this machine, against
    an engine of that base beside it.
    """
    # Imported here: torch takes seconds.
    from loraplex.bench.options import EngineLoad, EngineSetup, module_names

    from loraplex_deployments.bench_results import ServeBenchOptions
    from loraplex_deployments.bench_serve import run_serve_bench

    targets: tuple[Target, ...] = ()
    if model is None or url is not None:
        url, targets = load_targets(url, key, demo_file, ask or [])
    elif endpoint is not Endpoint.COMPLETIONS or ask:
        raise BadConfig("--ask and --endpoint are for a running platform: name it with --http", param="http")
    setup = None
    if model is not None:
        setup = EngineSetup(
            model=_source(model),
            device=device,
            dtype=dtype,
            threads=threads,
            tp=tp,
            pp=pp,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            num_pages=num_pages,
        )
    options = ServeBenchOptions(
        setup=setup,
        load=EngineLoad(
            requests=requests or streams,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            adapters=adapters,
            lora_ranks=(rank,),
            modules=module_names(modules),
            concurrency=streams,
        ),
        single_ttft=single_ttft,
        starts=starts,
        rounds=rounds,
        client_processes=clients or -(-streams // _STREAMS_PER_CLIENT),
        gateways=gateways,
        proxy=proxy,
        tokenizer=None if tokenizer is None else str(tokenizer),
        data_dir=None if data_dir is None else str(data_dir),
        url=url,
    )
    config = RequestConfig(endpoint=endpoint, ignore_eos=ignore_eos, timeout_s=timeout, seed=seed)
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there
        result = run_serve_bench(options, config, targets, _say)
    if as_json:
        print_json(msgspec.to_builtins(result))
    else:
        _print_serve(result)
    for one in result.rounds:
        require_an_answer(one.http.report)


def start_command(
    adapters: Annotated[int, typer.Option(min=1, help="Registered copies with different weights.")] = 1000,
    starts: Annotated[int, typer.Option(min=1, help="Starts with few and with all; the fastest counts.")] = 3,
    proxy: ProxyOption = _DEFAULT_PROXY,
    cache: Annotated[Path, typer.Option(help="Where the demo base is, or goes.")] = Path(".loraplex/models"),
) -> None:
    """How much later a platform with many adapters is ready.

    With the demo base; prints JSON.
    """
    from loraplex.demo.base import prepare_demo_base

    from loraplex_deployments.bench_start import run_start_bench

    prepare_demo_base(cache, _say)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        (Path(folder) / "models").symlink_to(cache.resolve())
        with contextlib.redirect_stdout(sys.stderr):
            result = run_start_bench(Path(folder), num_adapters=adapters, num_starts=starts, proxy=proxy, say=_say)
    print_json(msgspec.to_builtins(result))


def _source(model: str) -> str:
    if model != DEMO_MODEL:
        return model
    from loraplex.demo.base import prepare_demo_base

    return str(prepare_demo_base(Path(".loraplex/models"), _say))


def _print_serve(result: "ServeBenchResult") -> None:
    summary, options, machine = result.summary, result.options, result.machine
    line = f"{shown(summary.http_tokens_per_s)} output tokens/s through HTTP"
    if summary.http_over_engine is not None:
        line += (
            f", {shown(summary.engine_tokens_per_s)} of the engine alone on {machine.device_name}: "
            f"{summary.http_over_engine:.3f} of it"
        )
    typer.echo(line)
    where = options.url or f"{options.proxy} and {options.gateways} gateway{'s' * (options.gateways > 1)}"
    turn = result.rounds[0].http
    typer.echo(
        f"{options.load.requests} requests over {options.load.concurrency} streams to {where}; "
        f"starts: {options.starts}, rounds: {len(result.rounds)}; client processes: {turn.client_processes}, "
        f"the busiest computed {summary.busiest_client:.0%} of the time"
    )
    for error, count in summary.errors.items():
        typer.echo(f"error {error}: {shown(count)} requests")
    rows: list[list[Any]] = []
    for name, table in (
        ("TTFT", summary.ttft_ms),
        ("TPOT", summary.tpot_ms),
        ("TTFT alone", summary.single_ttft_ms),
    ):
        rows += [[f"{name} {q}", value.http, value.engine, value.added] for q, value in table.items()]
    print_table(["ms", "HTTP", "engine", "added"], rows)
    print_table(
        [f"CPU of {machine.cores} cores", "seconds", "cores busy", "ms per token"],
        [[role, cpu.seconds, cpu.cores, cpu.ms_per_token] for role, cpu in summary.cpu.items()],
    )


def _say(line: str) -> None:
    typer.echo(line, err=True)
