"""How benchmarks that are run as modules tell what they found: line by line on the way, all of it at the end."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraplex_deployments.bench_processes import warn_of_busy_machine


def say(line: str) -> None:
    """To stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def report(figures: Any, lines: Iterable[str], *, cpu: float, out: Path | None) -> None:
    """Writes ``figures`` (what JSON can hold) to ``out`` and prints ``lines``; and a warning if the machine was too
    busy for them. ``cpu``: the largest share of its CPU that was used meanwhile."""
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for line in lines:
        print(line)
    warn_of_busy_machine(cpu)
