"""``loraplex profile``: measures the engine's steps and fits the cost model, or writes an analytic profile."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from loraplex.cli.connection import JsonOption
from loraplex.cli.output import print_json, print_table
from loraplex.cli.shapes import parse_shapes
from loraplex.core.errors import BadConfig

if TYPE_CHECKING:
    from loraplex.cost.profile import CostProfile


def profile_command(
    out: Annotated[Path, typer.Option(help="JSON file of the profile.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="A Hugging Face directory, a .gguf file, or random:llama3-8b; several with --analytic."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    base: Annotated[str | None, typer.Option(help="The base's name in the profile; default: from --model.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The device's name in the profile; default: what it is.")] = None,
    analytic: Annotated[
        str | None, typer.Option(help="Measure nothing: from the ceilings of this GPU, e.g. h100-80gb.")
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="With --analytic: TPxPP with commas between, e.g. 1x1,2x1, or all.")
    ] = "all",
    samples: Annotated[Path | None, typer.Option(help="Also keep the step timings in this file.")] = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="Also add the times of decode steps, a row for each batch, to this JSON file of all shapes."),
    ] = None,
    fit: Annotated[Path | None, typer.Option(help="Measure nothing: fit a file of --samples again.")] = None,
    adapters: Annotated[int, typer.Option(min=0, help="Distinct adapters, at most.")] = 64,
    max_request_tokens: Annotated[
        int | None, typer.Option(min=8, help="Prompt and output of a request, at most; default: the base's context.")
    ] = None,
    budget_s: Annotated[float | None, typer.Option(min=0.0, help="No case of the grid starts later.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    tp: Annotated[int, typer.Option(min=1, help="Measure on a group: shards of every layer.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Measure on a group: stages of the layers.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads on the CPU, of each rank.")] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that run at once, at most.")] = 256,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step, at most.")] = 2048,
    num_pages: Annotated[int | None, typer.Option(min=1, help="Pages of the arena; default: what fits.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of lengths and prompts.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """What steps, memory and loads cost: by measuring, or by arithmetic."""
    # Imported here: torch takes seconds, and no other command needs it.
    from loraplex.bench.options import EngineSetup
    from loraplex.profiler.measure import ProfileOptions, measure
    from loraplex.profiler.measurement import Measurement

    models = model or []
    if fit is not None:
        profile = Measurement.load(fit).profile()
    elif analytic is not None:
        profile = _analytic(models, analytic, shapes)
    else:
        if len(models) != 1:
            raise BadConfig("give one --model to measure", param="model")
        options = ProfileOptions(
            setup=EngineSetup(
                model=models[0],
                device=device,
                dtype=dtype,
                tp=tp,
                pp=pp,
                threads=threads,
                max_running=max_running,
                max_step_tokens=max_step_tokens,
                num_pages=num_pages,
            ),
            base=base or _base_name(models[0]),
            gpu=gpu,
            num_adapters=adapters,
            max_request_tokens=max_request_tokens,
            budget_s=budget_s,
            seed=seed,
        )
        measurement = measure(options, say=lambda line: typer.echo(line, err=True))
        if samples is not None:
            samples.write_bytes(msgspec.json.encode(measurement))
        if rows is not None and measurement.decoding is not None:
            measurement.decoding.add_to(rows)
        profile = measurement.profile()
    out.write_bytes(profile.to_json())
    if as_json:
        print_json(msgspec.to_builtins(profile))
    else:
        _print(profile)
        _print_stages(profile)


def _analytic(models: list[str], gpu: str, shapes: str) -> "CostProfile":
    from loraplex.core.ids import BaseModelId
    from loraplex.cost.analytic import ALL_SHAPES, analytic_profile
    from loraplex.cost.ceilings import ceilings_of
    from loraplex.model_runner import load_model_spec

    if not models:
        raise BadConfig("give --model at least once", param="model")
    specs = [load_model_spec(name, BaseModelId(_base_name(name))) for name in models]
    chosen = ALL_SHAPES if shapes == "all" else parse_shapes(shapes)
    return analytic_profile(specs, ceilings_of(gpu), chosen)


def _base_name(model: str) -> str:
    """``random:llama3-8b`` -> ``llama3-8b``; a path -> its last part without ``.gguf``."""
    return Path(model.removeprefix("random:")).name.removesuffix(".gguf")


def _print(profile: "CostProfile") -> None:
    """A row per base and shape, with the reference steps of ARCHITECTURE section 8."""
    from loraplex.cost.step_cost import StepComposition

    decode = StepComposition.of(decode_rows=[1, 32], kv_tokens=[320, 32 * 320])
    prefill = StepComposition.of(prefill_rows=1, prefill_tokens=256, prefill_pairs=256 * 257 / 2, kv_tokens=256)
    rows = []
    for step in profile.steps:
        one, many = 1e3 * step.cost.latency_s(decode)
        (prompt,) = 1e3 * step.cost.latency_s(prefill)
        error = step.held_out
        judged = ["", ""] if error is None else [f"{error.median:.1%}", f"{error.p90:.1%}"]
        rows.append([step.base, step.gpu, f"{step.shape.tp}x{step.shape.pp}", step.source, one, many, prompt, *judged])
    print_table(
        ["base", "gpu", "shape", "source", "decode 1 ms", "decode 32 ms", "prefill 256 ms", "held out: median", "P90"],
        rows,
    )


def _print_stages(profile: "CostProfile") -> None:
    """Where each base would be cut into stages, beside the equal cut; ms of a decode step's slowest stage where the
    GPU's ceilings are known, else its weights in millions."""
    from loraplex.cost.ceilings import ceilings_of, known_gpus
    from loraplex.cost.roofline import decode_costs
    from loraplex.cost.stages import equal_stages, weight_costs

    rows = []
    for name, gpu in dict.fromkeys((step.base, step.gpu) for step in profile.steps):
        base = profile.base(name)
        known = gpu in known_gpus()
        if known:
            costs, scale = decode_costs(base.model, ceilings_of(gpu), itemsize=base.itemsize), 1e3
        else:
            costs, scale = weight_costs(base.model), 1e-6
        for num_stages in (2, 4):
            if num_stages > base.model.num_layers:
                continue
            equal, cut = equal_stages(base.model.num_layers, num_stages), costs.cut(num_stages)
            slowest = [costs.slowest(layers) for layers in (equal, cut)]
            rows.append(
                [
                    name,
                    gpu,
                    num_stages,
                    "ms" if known else "M weights",
                    " + ".join(map(str, equal)),
                    scale * slowest[0],
                    " + ".join(map(str, cut)),
                    scale * slowest[1],
                    f"{1 - slowest[1] / slowest[0]:.1%}",
                ]
            )
    print_table(["base", "gpu", "stages", "in", "equal layers", "slowest", "cut", "slowest", "less"], rows)
