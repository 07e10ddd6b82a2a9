"""``loraplex plan apply|show|status|watch|history|decisions|rollback``: plans of a running cluster. For administrators.

Adds its commands to the group ``plan``, whose others work on files alone.
"""

import time
from pathlib import Path
from typing import Annotated, Any

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
from loraplex.cli.output import print_json, print_table, shown_time
from loraplex.cli.plan import read_plan
from loraplex.cli.plan_diff import app
from loraplex.core.errors import BadConfig, Conflict

__all__ = ["app"]

WaitOption = Annotated[
    bool, typer.Option("--wait", help="Return when the cluster is there; fail when it does not come.")
]
LimitOption = Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")]
_POLL_S = 0.5


@app.command("apply")
def apply(
    file: Annotated[Path | None, typer.Argument(help="A plan, as `loraplex plan --out` writes it.")] = None,
    version: Annotated[int | None, typer.Option(help="A proposal of the planner instead of a file.")] = None,
    renumber: Annotated[bool, typer.Option(help="Give it the next version, whatever the file says.")] = False,
    wait: WaitOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Put a plan in force on the running cluster. No request is dropped on the way."""
    if (file is None) == (version is None):
        raise BadConfig("plan apply needs a FILE or --version, and not both")
    api = Api(admin_connection(url, key, demo_file))
    if file is not None:
        body = {"plan": msgspec.to_builtins(read_plan(file)), "renumber": renumber}
        record = api.post("/plans", json=body)
    else:
        record = api.post(f"/plans/{version}/accept")
    _applied(api, record, wait=wait, as_json=as_json)


@app.command("rollback")
def rollback(
    version: Annotated[int | None, typer.Argument(help="Default: the plan before. 0: the config's own.")] = None,
    wait: WaitOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """Put an older plan in force again."""
    api = Api(admin_connection(url, key, demo_file))
    _applied(api, api.post("/plans/rollback", json={"version": version}), wait=wait, as_json=as_json)


@app.command("show")
def show(
    version: Annotated[int | None, typer.Argument(help="Default: the plan in force, adapters as they are now.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
) -> None:
    """Print a plan of the cluster, YAML: what `plan diff` and `plan --current` read."""
    record = Api(admin_connection(url, key, demo_file)).get(f"/plans/{'active' if version is None else version}")
    typer.echo(msgspec.yaml.encode(record["plan"]).decode(), nl=False)


@app.command("status")
def status(
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """The plan in force, and how far the cluster is."""
    fleet = Api(admin_connection(url, key, demo_file)).get("/fleet")
    if as_json:
        print_json(fleet)
        return
    _print_fleet(fleet)


@app.command("watch")
def watch(
    until_settled: Annotated[bool, typer.Option(help="End when the cluster is as the plan says.")] = False,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
) -> None:
    """A line for each change of a group or a plan, until interrupted."""
    api = Api(admin_connection(url, key, demo_file))
    before: dict[str, str] = {}
    while True:
        fleet = api.get("/fleet")
        now = _lines(fleet)
        for name in before.keys() | now.keys():
            if before.get(name) != now.get(name):
                typer.echo(f"{time.strftime('%H:%M:%S')}  {now.get(name) or f'{name} is gone'}")
        before = now
        if until_settled and fleet["settled"]:
            return
        time.sleep(_POLL_S)


@app.command("history")
def history(
    limit: LimitOption = 20,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """The plans that there were, newest first, and those that wait to be accepted."""
    plans = Api(admin_connection(url, key, demo_file)).get("/plans", params={"limit": limit})["data"]
    if as_json:
        print_json(plans)
        return
    print_table(
        ["version", "state", "source", "created", "groups", "reason"],
        [
            [p["version"], p["state"], p["source"], shown_time(p["created"]), len(p["plan"]["groups"]), p["reason"]]
            for p in plans
        ],
    )


@app.command("decisions")
def decisions(
    limit: LimitOption = 20,
    url: UrlOption = None,
    key: KeyOption = None,
    demo_file: KeyFileOption = DEFAULT_KEY_FILE,
    as_json: JsonOption = False,
) -> None:
    """What was decided and why, what it should win and what came of it; newest first."""
    found = Api(admin_connection(url, key, demo_file)).get("/decisions", params={"limit": limit})["data"]
    if as_json:
        print_json(found)
        return
    print_table(
        ["at", "plan", "decision", "before", "predicted gain", "after", "reason"],
        [
            [
                shown_time(d["at_s"]),
                d["plan_version"],
                d["kind"],
                d["attainment_before"],
                d["predicted_gain"],
                d["attainment_after"],
                d["reason"],
            ]
            for d in found
        ],
    )


def _applied(api: Api, record: dict[str, Any], *, wait: bool, as_json: bool) -> None:
    version = record["version"]
    if wait:
        while not (fleet := api.get("/fleet"))["settled"]:
            if fleet["active"]["version"] != version:
                break
            time.sleep(_POLL_S)
        record = api.get(f"/plans/{version}") if version else record
        if fleet["active"]["version"] != version:
            raise Conflict(f"plan {version} is {record['state']}: {record['reason']}")
    if as_json:
        print_json(record)
        return
    typer.echo(f"plan {version} is {'reached' if wait else 'in force'} ({record['source']})")


def _print_fleet(fleet: dict[str, Any]) -> None:
    active = fleet["active"]
    typer.echo(
        f"plan {active['version']} from {active['source']}, {active['state']}; planning: {fleet['mode']}"
        + (f"; {fleet['problem']}" if fleet["problem"] else "")
    )
    if not fleet["groups"]:
        typer.echo("it has no groups")
        return
    print_table(
        ["group", "runs as", "bases", "shape", "GPU", "nodes", "state", "replicas", "adapters", "reason"],
        [
            [
                group["name"] or "-",
                group["group"] or None,
                "+".join(group["bases"]),
                f"tp{group['shape']['tp']} pp{group['shape']['pp']}",
                group["gpu"] or None,
                " ".join(dict.fromkeys(group["nodes"])) or None,
                group["state"],
                " ".join(replica["replica_id"] for replica in group["replicas"]) or None,
                sum(len(replica["adapters"]) for replica in group["replicas"]),
                group["reason"],
            ]
            for group in fleet["groups"]
        ],
    )


def _lines(fleet: dict[str, Any]) -> dict[str, str]:
    """Of each part of the fleet, the line that tells its state."""
    active = fleet["active"]
    found = {"plan": f"plan {active['version']} is {active['state']}" + (", reached" if fleet["settled"] else "")}
    if fleet["num_outdated"]:
        found["upgrade"] = f"{fleet['num_outdated']} replicas of another release are still to be replaced"
    for group in fleet["groups"]:
        name = group["name"] or f"group {group['group']}"
        replicas = ", ".join(f"{replica['replica_id']} {replica['state']}" for replica in group["replicas"])
        found[name] = f"{name} is {group['state']}" + (f": {replicas}" if replicas else "")
        if group["reason"]:
            found[name] += f" ({group['reason']})"
    return found
