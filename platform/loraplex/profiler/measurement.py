"""Step timings as values, and the profile that follows from them. A measurement can be kept as a file and fitted again
without the device. Made by ``measure``.
"""

from pathlib import Path
from typing import Self

import msgspec

from loraplex.core.errors import BadConfig
from loraplex.core.plan import Shape
from loraplex.cost.profile import BaseProfile, CostProfile, GpuProfile, StepProfile
from loraplex.cost.samples import Samples
from loraplex.cost.step_cost import StepCost
from loraplex.profiler.decoding import DecodeRows
from loraplex.profiler.fit import fit_coefficients, fit_pipeline, held_out_error


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one base on one device in one shape."""

    base: BaseProfile
    gpu: GpuProfile
    shape: Shape
    note: str
    fitted: Samples
    """Of a pipeline steps that were under way while the one before them was, as in ``held_out``."""
    held_out: Samples
    """Of loads that are not among the fitted ones."""
    lone: Samples | None = None
    """Of a pipeline: steps that had it for themselves, of the loads that are fitted."""
    decoding: DecodeRows | None = None
    """Decode steps of full batches; not fitted."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """BadConfig naming file and key."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise BadConfig(f"{path}: cannot be read: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise BadConfig(f"{path}: not a measurement: {error}") from error

    def profile(self) -> CostProfile:
        """Fits the one set of steps, judges by the other. BadConfig when there are too few steps."""
        interval = fit_coefficients(*self.fitted.arrays())
        # As many stages, each as slow as the slowest.
        cost = StepCost(interval=interval, latency=interval.slowed(self.shape.pp))
        if self.lone is not None:
            cost = fit_pipeline(interval, *self.lone.arrays(), stages=self.shape.pp)
        step = StepProfile(
            base=self.base.name,
            gpu=self.gpu.name,
            shape=self.shape,
            source="measured",
            note=self.note,
            cost=cost,
            held_out=held_out_error(interval, *self.held_out.arrays()),
        )
        return CostProfile(gpus=(self.gpu,), bases=(self.base,), steps=(step,))
