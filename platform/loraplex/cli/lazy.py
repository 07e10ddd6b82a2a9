"""Command groups whose members are imported when they are used, so that ``loraplex --help`` is fast.

Also finds commands of other packages (entry-point group ``loraplex.commands``) without importing them, and turns errors
into one line and an exit code. Used by ``main`` and by groups that other packages add to.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from loraplex.core.errors import BadConfig, LoraplexError, Unavailable

ENTRY_POINT_GROUP = "loraplex.commands"


class LazyGroup(TyperGroup):
    """Subclasses name their members in ``members``: name -> (``module:attribute``, help line).

    The attribute is a Typer application or a function that becomes one command. Entry points come on top: those named
    as the command for the program itself, GROUP.COMMAND for a group of it.
    """

    members: dict[str, tuple[str, str]] = {}  # noqa: RUF012 - a table of the class, never changed
    group = ""
    """Name of a group below the program; empty for the program itself."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._sources = dict(self.members)
        for entry_point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
            group, _, command = entry_point.name.rpartition(".")
            if group == self.group:
                self._sources.setdefault(command, (entry_point.value, _described(entry_point.value)))
        for name, (_, help_line) in self._sources.items():
            self.add_command(TyperCommand(name, help=help_line), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in self._sources:
            command = load_command(name, self._sources[name][0])
        return name, command, rest

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Exit code 2 for wrong options and configuration, 1 for every other error; ``--debug`` shows the traceback."""
        debug = "--debug" in (sys.argv[1:] if args is None else args)
        try:
            return super().main(args, *rest, **options)
        except LoraplexError as error:
            if debug:
                raise
            _complain(error.message)
            sys.exit(2 if isinstance(error, BadConfig) else 1)
        except Exception as error:  # the last stop: whatever it is, a user gets one line
            if debug:
                raise
            _complain(f"{type(error).__name__}: {error} (--debug shows where)")
            sys.exit(1)


def load_command(name: str, source: str) -> Any:
    """The command behind ``module:attribute``. Raises Unavailable when it cannot be imported."""
    module_name, _, attribute = source.partition(":")
    try:
        target: typer.Typer | Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"command {name}: cannot load {source}: {error}") from error
    if not isinstance(target, typer.Typer):
        application = typer.Typer(add_completion=False)
        application.command(name)(target)
        target = application
    command = typer.main.get_command(target)
    command.name = name
    return command


def _described(source: str) -> str:
    """First line of the function's docstring, read from its source file; only its parent packages are imported."""
    module_name, _, attribute = source.partition(":")
    fallback = f"From {module_name}."
    try:
        spec = importlib.util.find_spec(module_name)
        if spec is None or spec.origin is None:
            return fallback
        with open(spec.origin, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (ImportError, OSError, SyntaxError, ValueError):
        return fallback
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            docstring = ast.get_docstring(node) or ""
            return docstring.split("\n", 1)[0] or fallback
    return fallback


def _complain(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
