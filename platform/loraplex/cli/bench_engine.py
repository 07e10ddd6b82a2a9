"""``loraplex bench engine`` and ``loraplex bench sweep``: options in, tables or JSON out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table, shown
from loraplex.core.errors import BadConfig

if TYPE_CHECKING:
    from loraplex.bench.results import EngineBenchResult, LoadResult, PartTimes

ModelOption = Annotated[
    str, typer.Option(help="A Hugging Face directory, a .gguf file, or random:llama3-8b and the like.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
TpOption = Annotated[int, typer.Option(min=1, help="Shards of every layer, each on a rank of its own.")]
PpOption = Annotated[int, typer.Option(min=1, help="Stages of the layers, one after the other.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="torch threads on the CPU, of each rank.")]
RunningOption = Annotated[int, typer.Option(min=1, help="Requests that run at once, at most.")]
StepTokensOption = Annotated[int, typer.Option(min=1, help="Tokens of one step, at most.")]
PagesOption = Annotated[int | None, typer.Option(min=1, help="Pages of the arena; default: what fits.")]
InvariantOption = Annotated[
    bool, typer.Option("--batch-invariant", help="On CUDA: logits that do not depend on what else is in the batch.")
]
CeilingsOption = Annotated[
    str | None,
    typer.Option(help="What eta is measured against: h100-80gb and the like, or a JSON file; default: by the device."),
]


def engine_command(
    model: ModelOption,
    requests: Annotated[int, typer.Option(min=1, help="How many in all.")] = 64,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Prompt tokens of each.")] = 256,
    output_tokens: Annotated[int, typer.Option("--output", min=1, help="Output tokens of each.")] = 128,
    adapters: Annotated[int, typer.Option(min=0, help="Distinct adapters; 0: the plain base.")] = 0,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank of each adapter.")] = 16,
    mixed_ranks: Annotated[
        str | None, typer.Option(help="Ranks of the adapters in turn, e.g. 8,16,32,64; instead of --rank.")
    ] = None,
    modules: Annotated[str, typer.Option(help="Projections with LoRA, e.g. q,k,v,o.")] = "all",
    popularity: Annotated[
        str, typer.Option(help="Of the adapters: round-robin, uniform, zipf or none.")
    ] = "round-robin",
    zipf_exponent: Annotated[float, typer.Option(min=0.0, help="With --popularity zipf.")] = 1.0,
    resident: Annotated[
        bool, typer.Option("--resident/--cold", help="Adapters on the accelerator, or in host memory, at the start.")
    ] = True,
    adapter_bytes_cap: Annotated[
        int | None, typer.Option(min=1, help="Bytes that adapters may take on the accelerator.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="How many at a time; default: all at once.")] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Short requests before the clock; default: as many as run at once.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of adapters and their draws.")] = 0,
    single_ttft: Annotated[
        int, typer.Option(min=0, help="Also: this many lone requests each of base, warm and cold adapter.")
    ] = 0,
    profile: Annotated[int, typer.Option(min=0, help="Also: the time of this many decode steps by part.")] = 0,
    profile_trace: Annotated[
        str | None, typer.Option(help="With --profile: a file for their timeline, .json or .json.gz.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    tp: TpOption = 1,
    pp: PpOption = 1,
    threads: ThreadsOption = None,
    max_running: RunningOption = 256,
    max_step_tokens: StepTokensOption = 2048,
    num_pages: PagesOption = None,
    batch_invariant: InvariantOption = False,
    ceilings: CeilingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The engine alone, on CPU or GPU, without Ray and HTTP."""
    # Imported here: torch takes seconds, and no other command needs it.
    from loraplex.bench.engine_bench import run_engine_bench
    from loraplex.bench.options import EngineBenchOptions, EngineLoad, EngineSetup, module_names
    from loraplex.bench.random_adapters import Popularity

    if popularity not in set(Popularity):
        raise BadConfig(f"popularity {popularity!r} is not one of {', '.join(Popularity)}", param="popularity")
    result = run_engine_bench(
        EngineBenchOptions(
            setup=EngineSetup(
                model=model,
                device=device,
                dtype=dtype,
                tp=tp,
                pp=pp,
                threads=threads,
                max_running=max_running,
                max_step_tokens=max_step_tokens,
                num_pages=num_pages,
                batch_invariant=batch_invariant,
                ceilings=ceilings,
            ),
            load=EngineLoad(
                requests=requests,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                adapters=adapters,
                lora_ranks=(rank,) if mixed_ranks is None else _ranks(mixed_ranks),
                modules=module_names(modules),
                popularity=Popularity(popularity),
                zipf_exponent=zipf_exponent,
                resident=resident,
                adapter_bytes_cap=adapter_bytes_cap,
                concurrency=concurrency,
                warmup_requests=warmup,
                seed=seed,
            ),
            single_ttft=single_ttft,
            profile_steps=profile,
            profile_trace=profile_trace,
        )
    )
    if as_json:
        print_json(msgspec.to_builtins(result))
    else:
        _print_engine(result)


def sweep_command(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="JSON file of the table; an SVG plot is written beside it.")],
    cases: Annotated[str, typer.Option(help="Names, commas between them; default: all..")] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Times that the cases take turns.")] = 1,
    budget_s: Annotated[
        float | None, typer.Option(min=0.0, help="No case starts later than this after the start of the command.")
    ] = None,
    shrink: Annotated[int, typer.Option(min=1, help="Divide requests, adapters and tokens by this.")] = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    tp: TpOption = 1,
    pp: PpOption = 1,
    threads: ThreadsOption = None,
    max_running: RunningOption = 256,
    max_step_tokens: StepTokensOption = 2048,
    num_pages: PagesOption = None,
    batch_invariant: InvariantOption = False,
    ceilings: CeilingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """All loads of the engine's table with one loaded model. Goes on where the file ends."""
    from loraplex.bench.options import EngineSetup
    from loraplex.bench.sweep import SweepOptions, run_sweep

    options = SweepOptions(
        setup=EngineSetup(
            model=model,
            device=device,
            dtype=dtype,
            tp=tp,
            pp=pp,
            threads=threads,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            num_pages=num_pages,
            batch_invariant=batch_invariant,
            ceilings=ceilings,
        ),
        cases=() if cases == "all" else tuple(name.strip() for name in cases.split(",")),
        rounds=rounds,
        budget_s=budget_s,
        shrink=shrink,
    )
    table = run_sweep(options, out, say=lambda line: typer.echo(line, err=True))
    if as_json:
        print_json(msgspec.to_builtins(table))
        return
    print_table(
        ["case", "requests", "adapters", "rank", "tok/s", "TTFT ms", "TPOT ms", "eta", "vs first"],
        [
            [s.case, s.requests, s.adapters, s.lora_rank, s.output_tokens_per_s, s.ttft_ms, s.tpot_ms, s.eta, s.ratio]
            for s in table.summary
        ],
    )
    if table.left:
        typer.echo(f"not run within the budget: {', '.join(table.left)}")


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise BadConfig(f"ranks {text!r} are not whole numbers with commas between", param="mixed_ranks") from None


def _print_engine(bench: "EngineBenchResult") -> None:
    result, machine = bench.result, bench.machine
    typer.echo(
        f"{shown(result.output_tokens_per_s)} output tokens/s, {shown(result.total_tokens_per_s)} tokens/s with "
        f"prompts, {shown(result.duration_s)} s on {machine.device_name}"
    )
    typer.echo(
        f"{shown(result.steps)} steps of {shown(1000 * result.mean_step_s)} ms, {result.engine_share:.1%} of the time "
        f"outside of them, {shown(result.preemptions)} preemptions"
        + ("" if machine.ready_s is None else f"; first token {shown(machine.ready_s)} s after the process started")
    )
    if result.adapters is not None:
        typer.echo(
            f"adapters: {shown(result.adapters.loads)} loads, {shown(result.adapters.loads_per_s)} a second, "
            f"{result.adapters.hit_rate:.1%} of the requests found theirs on the accelerator"
        )
    _print_eta(result)
    rows = [("TTFT", result.ttft_s), ("TPOT", result.tpot_s), ("E2E", result.e2e_s)]
    if bench.single_ttft is not None:
        single = bench.single_ttft
        rows += [("TTFT alone, base", single.base_s), ("warm adapter", single.warm_s), ("cold adapter", single.cold_s)]
    print_table(
        ["ms", "mean", "p50", "p90", "p99"],
        [[name, *(1000 * v for v in (p.mean, p.p50, p.p90, p.p99))] for name, p in rows if p is not None],
    )
    _print_parts("prefill", bench.prefill_parts)
    _print_parts("decode", bench.decode_parts)


def _print_eta(result: "LoadResult") -> None:
    eta = result.eta
    phases = [("decode", eta.decode), ("prefill", eta.prefill)]
    print_table(
        [f"eta {eta.eta:.3f} ({eta.ceilings})", "steps", "ms a step", "eta", "the ideal time is"],
        [
            [
                name,
                phase.steps,
                1e3 * phase.measured_s / phase.steps,
                phase.eta,
                ", ".join(f"{part} {share:.0%}" for part, share in phase.ideal_shares.items()),
            ]
            for name, phase in phases
            if phase is not None
        ],
    )


def _print_parts(phase: str, parts: "PartTimes | None") -> None:
    if parts is not None:
        shares = ", ".join(f"{part} {share:.1%}" for part, share in parts.shares.items())
        typer.echo(
            f"{phase}: {parts.steps} steps in {shown(1000 * parts.wall_s)} ms, device busy "
            f"{parts.busy_s / parts.wall_s:.1%}: {shares}"
        )
        if parts.host_waits is not None:
            waits = ", ".join(f"{call} {shown(count)}" for call, count in parts.host_waits.items())
            typer.echo(f"  the host waits, times a step: {waits or 'never'}")
