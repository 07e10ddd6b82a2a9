"""What a replica has of its devices' memory, as prediction and measurement alike have it. Pure.

Apart from ``costs``: who measures needs no planner. Called by ``costs`` and ``replicas``.
"""

from loraplex.bench.fleet.options import Experiment
from loraplex.core.plan import Shape
from loraplex.cost.memory import MemoryModel
from loraplex.cost.profile import CostProfile


def fleet_memory(experiment: Experiment, profile: CostProfile, base: str, shape: Shape) -> MemoryModel:
    """On a device of the fleet."""
    engine = experiment.replica_engine
    return profile.memory(
        base,
        experiment.gpu,
        shape,
        memory_fraction=experiment.memory_fraction,
        max_step_tokens=engine.max_step_tokens,
        max_rows=engine.max_running,
    )
