"""Composes the command groups. Entry point of the ``loraplex`` program."""

import importlib.metadata
from typing import Annotated

import typer

from loraplex.cli.lazy import LazyGroup


class Root(LazyGroup):
    members = {  # noqa: RUF012
        "status": ("loraplex.cli.status:status_command", "What a running platform serves, and from where."),
        "top": ("loraplex.cli.top:top_command", "Groups, queues, tenants and adapters of a running platform, live."),
        "chat": ("loraplex.cli.chat:chat_command", "Talk to a model: one message, or a conversation."),
        "tenant": ("loraplex.cli.tenant:app", "Create, change and delete tenants; see their usage."),
        "key": ("loraplex.cli.key:app", "API keys of a tenant."),
        "adapter": ("loraplex.cli.adapter:app", "Register, list, roll back and delete adapters."),
        "state": ("loraplex.cli.state:app", "Back up and restore tenants, keys, adapters and plans."),
        "trace": ("loraplex.cli.trace:app", "Look at traffic; make, convert and split traces."),
        "replay": ("loraplex.cli.replay:replay_command", "Send a trace back as open-loop load and report latencies."),
        "simulate": ("loraplex.cli.simulate:simulate_command", "Simulate a trace through a plan."),
        "simulate-alpaserve": (
            "loraplex.cli.simulate_alpaserve:simulate_alpaserve_command",
            "Score recorded AlpaServe placements with our simulator.",
        ),
        "plan": ("loraplex.cli.plan_live:app", "Plan groups from a trace; plans of a running cluster."),
        "whatif": ("loraplex.cli.whatif:whatif_command", "Attainment under other circumstances."),
        "plan-alpaserve": (
            "loraplex.cli.plan_alpaserve:plan_alpaserve_command",
            "Place the models of AlpaServe cases with our planner.",
        ),
        "config": ("loraplex.cli.config:app", "Check and explain the platform's configuration file; its schema."),
        "bench": ("loraplex.cli.bench:app", "Measure the engine alone or a running server."),
        "profile": ("loraplex.cli.profile:profile_command", "Measure what a step costs, as a profile for the planner."),
    }


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loraplex {importlib.metadata.version('loraplex')}")
        raise typer.Exit


app = typer.Typer(cls=Root, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Loraplex: many tenants' LoRA adapters over one base model, on Ray."""


def main() -> None:
    """Runs the program with the process's arguments."""
    typer.main.get_command(app)(prog_name="loraplex")
