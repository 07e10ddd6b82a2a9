"""Decides what each step computes: admission, pages, adapter residency. Pure: no torch, no I/O, no clock, no threads.

``Engine`` is the door: events go in, ``Instructions`` and ``RequestOutput`` come out. ``replica`` runs it beside an
executor; the simulator runs the same class on a virtual clock.
"""

from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.instructions import AdapterLoad, Instructions

__all__ = ["AdapterLoad", "Engine", "EngineConfig", "Instructions"]
