"""Seconds of a composition, compiled; shared by both simulators."""

from loraplex.cost.step_cost import step_seconds
from loraplex.simulator.compiled import compiled

seconds_of = compiled(step_seconds)
"""By the coefficients of a latency or of an interval (``StepCoefficients.array``); the rest as in
``StepComposition``."""
