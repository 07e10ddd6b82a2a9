"""``loraplex top``: a live view of a running platform."""

import contextlib
import math
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from loraplex.cli.api import Api
from loraplex.cli.connection import (
    DEFAULT_KEY_FILE,
    JsonOption,
    KeyFileOption,
    KeyOption,
    UrlOption,
    admin_connection,
)
from loraplex.cli.output import FILE_WIDTH, print_json
from loraplex.cli.top_view import overview, tables

_FORGOTTEN_S = 10.0
"""A gateway that has not answered for so long is not shown any more."""


def top_command(
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    window: Annotated[float, typer.Option(min=1, max=300, help="Seconds of requests that count.")] = 60.0,
    slo: Annotated[str, typer.Option("--slo", help='Targets, e.g. "ttft=500ms,tpot=50ms".')] = "ttft=500ms,tpot=50ms",
    top: Annotated[int, typer.Option(min=0, help="How many tenants and adapters, the busiest.")] = 15,
    once: Annotated[bool, typer.Option("--once", help="One look (two, an interval apart, for the rates).")] = False,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Groups, queues, tenants and adapters of a running platform, live. Needs an administrator's key."""
    # Imported here: it brings the planner along, and takes a second.
    from loraplex.cli.plan import parse_slo

    targets = parse_slo(slo)
    params = {"window_s": window, "max_adapters": top}
    params |= {
        name: seconds
        for name, seconds in (("ttft_s", targets.ttft_s), ("tpot_s", targets.tpot_s))
        if math.isfinite(seconds)
    }
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    watch = _Watch(Api(admin_connection(url, key, demo_file)), params)
    with contextlib.suppress(KeyboardInterrupt):
        watch.look()
        time.sleep(interval)
        if once or as_json or not console.is_terminal:
            _write(watch, console, once=once, as_json=as_json, top=top, slo=slo, interval=interval)
            return
        with Live(tables(watch.look(), top=top, slo=slo), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(tables(watch.look(), top=top, slo=slo), refresh=True)


def _write(
    watch: "_Watch", console: Console, *, once: bool, as_json: bool, top: int, slo: str, interval: float
) -> None:
    """One look below the other."""
    while True:
        state = watch.look()
        if as_json:
            print_json(state)
        else:
            console.print(tables(state, top=top, slo=slo))
        if once:
            return
        time.sleep(interval)


class _Watch:
    """Asks whatever gateway answers, and remembers what each of them said last: a proxy takes them by turns."""

    def __init__(self, api: Api, params: dict[str, float]) -> None:
        self._api = api
        self._params = params
        self._activities: dict[str, tuple[float, Any]] = {}
        self._before: tuple[float, dict[str, Any]] | None = None

    def look(self) -> dict[str, Any]:
        status = self._api.get("/status")
        activity = self._api.get("/activity", params=self._params)
        now_s = time.monotonic()
        self._activities[activity["gateway"]] = (now_s, activity)
        known = {gateway: said for gateway, said in self._activities.items() if said[0] > now_s - _FORGOTTEN_S}
        self._activities = known
        before_s, before = (now_s, None) if self._before is None else self._before
        state = overview(status, [said for _, said in known.values()], before, now_s - before_s)
        self._before = (now_s, state)
        return state
