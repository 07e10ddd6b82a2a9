"""``loraplex trace plot``: a trace as an HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex.core.errors import NotFound
from loraplex.traces.plot.collect import collect
from loraplex.traces.plot.page import render


def plot_command(
    path: Annotated[str, typer.Argument(help="A trace file, a folder of them, a glob or a pyarrow.fs URL.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("trace.html"),
) -> None:
    """Draw rate over time, adapters over time and lengths on one HTML page that needs no network."""
    if not out.absolute().parent.is_dir():
        raise NotFound(f"--out {out}: no directory {out.absolute().parent}")
    page = render(collect(path), title=f"Trace {Path(path).name}")
    out.write_text(page, encoding="utf-8")
    typer.echo(f"wrote {out}")
