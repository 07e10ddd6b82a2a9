"""``loraplex trace synth``: a trace made up to a recipe."""

from typing import Annotated

import typer

from loraplex.cli.output import shown
from loraplex.core.errors import BadConfig
from loraplex.traces.sink import TraceSink
from loraplex.traces.synth.generate import generate
from loraplex.traces.synth.lengths import FORMS
from loraplex.traces.synth.recipe import Diurnal, Drift, FlashCrowd, OnOff, Popularity, Process, Recipe


def synth_command(
    out: Annotated[str, typer.Option("--out", "-o", help="Parquet file to write, or a pyarrow.fs URL.")],
    adapters: Annotated[int, typer.Option(help="How many.")] = 16,
    tenants: Annotated[int, typer.Option(help="Who own the adapters.")] = 1,
    tenant_skew: Annotated[float, typer.Option(help="Tenant j owns a share (j + 1)^-SKEW of the adapters.")] = 0.0,
    base: Annotated[
        list[str] | None, typer.Option(help="Base model NAME, or NAME=SHARE of the adapters; may be repeated.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, all adapters together.")] = 10.0,
    duration: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    requests: Annotated[int | None, typer.Option(help="End after so many.")] = None,
    popularity: Annotated[Popularity, typer.Option(help="How adapters share the rate.")] = Popularity.POWER_LAW,
    skew: Annotated[float, typer.Option(help="Of power-law: adapter i gets (i + 1)^-SKEW; Zipf is 1.")] = 0.5,
    process: Annotated[Process, typer.Option(help="Gaps between the arrivals of an adapter.")] = Process.GAMMA,
    cv: Annotated[float, typer.Option(help="Coefficient of variation of the gaps of gamma.")] = 1.0,
    diurnal: Annotated[
        str | None, typer.Option(help="PERIOD,AMPLITUDE: a day of PERIOD s, rate 1 +- AMPLITUDE, lowest at 0.")
    ] = None,
    flash: Annotated[
        list[str] | None,
        typer.Option(
            help="AT,DURATION,FACTOR[,FIRST,COUNT]: flash crowd, on COUNT adapters from FIRST; may be repeated."
        ),
    ] = None,
    drift: Annotated[str | None, typer.Option(help="EVERY[,SHIFT]: ranks move on by SHIFT every EVERY s.")] = None,
    on_off: Annotated[
        str | None, typer.Option(help="ON,OFF: mean seconds; each adapter is on and off in turn.")
    ] = None,
    lengths: Annotated[str, typer.Option(help=FORMS + ".")] = "lognormal:512,1,128,1",
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Cut longer prompts.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(help="Cut longer answers.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and options give the same bytes.")] = 0,
) -> None:
    """Make up a trace: popularity, bursts, day and night, flash crowds, drift, lengths.

    With gamma, the rates and arrivals are those of AlpaServe's generator, bit for bit.
    """
    recipe = Recipe(
        adapters=adapters,
        tenants=tenants,
        tenant_skew=tenant_skew,
        base_models=tuple(_base(text) for text in base or ()),
        rate=rate,
        duration_s=duration,
        requests=requests,
        popularity=popularity,
        skew=skew,
        process=process,
        cv=cv,
        diurnal=None if diurnal is None else _diurnal(diurnal),
        flash_crowds=tuple(_flash(text) for text in flash or ()),
        drift=None if drift is None else _drift(drift),
        on_off=None if on_off is None else _on_off(on_off),
        lengths=lengths,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        seed=seed,
    )
    with TraceSink(out) as sink:
        for table in generate(recipe):
            sink.write(table)
    typer.echo(f"{shown(sink.rows)} requests in {out}")


def _base(text: str) -> tuple[str, int]:
    name, equals, share = text.partition("=")
    if not name or (equals and not share.isdigit()):
        raise BadConfig(f"--base {text!r}, expected NAME or NAME=SHARE", param="base")
    return name, int(share) if equals else 1


def _numbers(option: str, text: str, form: str, *counts: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise BadConfig(f"{option} {text!r}, expected {form}", param=option.lstrip("-"))
    return numbers


def _whole(option: str, text: str, number: float) -> int:
    if not number.is_integer():
        raise BadConfig(f"{option} {text!r}: {number} is no whole number", param=option.lstrip("-"))
    return int(number)


def _diurnal(text: str) -> Diurnal:
    period_s, amplitude = _numbers("--diurnal", text, "PERIOD,AMPLITUDE", 2)
    return Diurnal(period_s=period_s, amplitude=amplitude)


def _flash(text: str) -> FlashCrowd:
    at_s, duration_s, factor, *which = _numbers("--flash", text, "AT,DURATION,FACTOR[,FIRST,COUNT]", 3, 5)
    first, count = (_whole("--flash", text, number) for number in which) if which else (0, None)
    return FlashCrowd(at_s=at_s, duration_s=duration_s, factor=factor, first=first, count=count)


def _drift(text: str) -> Drift:
    every_s, *shift = _numbers("--drift", text, "EVERY[,SHIFT]", 1, 2)
    return Drift(every_s=every_s, shift=_whole("--drift", text, shift[0]) if shift else 1)


def _on_off(text: str) -> OnOff:
    mean_on_s, mean_off_s = _numbers("--on-off", text, "ON,OFF", 2)
    return OnOff(mean_on_s=mean_on_s, mean_off_s=mean_off_s)
