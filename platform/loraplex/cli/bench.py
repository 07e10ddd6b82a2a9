"""``loraplex bench ...``: composes what measures the engine alone and, from the packages that have it, the platform."""

import typer

from loraplex.cli.lazy import LazyGroup


class Bench(LazyGroup):
    group = "bench"
    members = {  # noqa: RUF012
        "engine": ("loraplex.cli.bench_engine:engine_command", "The engine alone, on CPU or GPU."),
        "sweep": ("loraplex.cli.bench_engine:sweep_command", "All loads of the engine's table with one loaded model."),
        "fleet": ("loraplex.cli.bench_fleet:app", "A plan's replicas on real devices, without Ray."),
    }


app = typer.Typer(cls=Bench, no_args_is_help=True, add_completion=False)


@app.callback()
def bench() -> None:
    """Measure the engine alone, or the platform around it."""
