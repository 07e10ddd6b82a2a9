"""Steps and how long they took, as values. Pure. Called by the profiler and ``bench.fleet``."""

from dataclasses import fields
from typing import Self

import msgspec
import numpy as np

from loraplex.cost.ceilings import FloatArray
from loraplex.cost.step_cost import StepComposition


class Samples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """S steps."""

    composition: dict[str, list[float]]
    """Field of ``StepComposition`` -> S values."""
    seconds: list[float]
    """From the end of the step before, or from the step's beginning where that was later."""

    @classmethod
    def of(cls, steps: StepComposition, seconds: FloatArray) -> Self:
        columns = {field.name: getattr(steps, field.name).tolist() for field in fields(StepComposition)}
        return cls(composition=columns, seconds=seconds.tolist())

    def arrays(self) -> tuple[StepComposition, FloatArray]:
        steps = StepComposition(**{name: np.array(values) for name, values in self.composition.items()})
        return steps, np.array(self.seconds)
