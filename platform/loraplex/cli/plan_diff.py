"""``loraplex plan diff``: what it costs to go from one plan to another, or from the one in force to it.

Adds its command to the group ``plan``.
"""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from loraplex.cli.api import Api
from loraplex.cli.connection import (
    DEFAULT_KEY_FILE,
    JsonOption,
    KeyFileOption,
    KeyOption,
    UrlOption,
    admin_connection,
)
from loraplex.cli.output import print_json, print_table, shown_bytes
from loraplex.cli.plan import FleetOption, app, bases_of, read_fleet, read_plan
from loraplex.core.errors import BadConfig
from loraplex.core.plan import Plan
from loraplex.planner.migration import move_between

__all__ = ["app"]


@app.command("diff")
def diff(
    plans: Annotated[
        list[Path], typer.Argument(help="A plan; or two, of which the first stands for the plan in force.")
    ],
    fleet: FleetOption,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """What it costs to go to a plan: from the one in force on the running cluster, or from another."""
    if len(plans) > 2:
        raise BadConfig("plan diff compares two plans: the one in force and a FILE, or two FILEs")
    layout = read_fleet(fleet)
    *old, new = [layout.fitting(read_plan(path), where=str(path)) for path in plans]
    if not old:
        record = Api(admin_connection(url, key, demo_file)).get("/plans/active")
        active = msgspec.convert(record["plan"], Plan)
        old = [layout.fitting(active, where=f"plan {active.version}, which is in force")]
    costs = layout.costs(dict.fromkeys(base for one in (*old, new) for base in bases_of(one)))
    move = move_between(costs, lambda _, tenant, name: layout.size_of(tenant, name), old[0], new)
    if as_json:
        print_json(move)
        return
    print_table(
        ["group", "was", "weights per GPU", "adapters", "stopped s"],
        [
            [one.group, one.was or "-", shown_bytes(one.weight_bytes), shown_bytes(one.adapter_bytes), one.stopped_s]
            for one in move.groups
        ],
    )
    typer.echo(
        f"{len(move.groups)} groups change: {shown_bytes(move.weight_bytes)} of weights and "
        f"{shown_bytes(move.adapter_bytes)} of adapters are loaded, {move.lost_gpu_s:.1f} GPU seconds serve nothing"
    )
