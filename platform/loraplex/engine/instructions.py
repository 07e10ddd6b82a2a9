"""What the engine tells its driver to do next. Made by ``Engine.schedule``, carried out by ``replica.driver``."""

from dataclasses import dataclass

from loraplex.core.ids import Digest
from loraplex.core.step import StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLoad:
    digest: Digest
    pages: tuple[int, ...]
    """No step in flight uses what they held before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instructions:
    """Carried out in this order: drops, unstages, loads, plan."""

    drops: tuple[Digest, ...] = ()
    """Adapters to forget on the accelerator: their pages have a new owner."""
    unstages: tuple[Digest, ...] = ()
    """Adapters to forget in host memory."""
    loads: tuple[AdapterLoad, ...] = ()
    """Adapters to copy from host memory into pages, those that the plan needs first."""
    plan: StepPlan | None = None
    """None: nothing can run until the oldest step in flight is answered or another event arrives."""
