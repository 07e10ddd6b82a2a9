"""What a fleet experiment is: devices, bases, costs, loads and placements. Pure data, read from JSON.

Called by ``prepare``; a prepared experiment carries it along.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec

from loraplex.core.errors import BadConfig
from loraplex.engine import EngineConfig

PLANNER = "planner"
"""Name of a placement."""

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class FleetBase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A base model of the fleet."""

    name: str
    model: str
    """A Hugging Face directory, a .gguf file, or ``random:NAME``."""
    profile: str | None = None
    """Its name in the cost profiles; None: ``name``."""


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the requests of a base."""

    ttft_s: _Positive
    tpot_s: _Positive


class SyntheticLoad(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="synthetic"
):
    """Made by ``traces.synth``. One timeline: the time that is planned on, the warm-up, what counts."""

    recipe: dict[str, Any]
    """Fields of ``traces.synth.Recipe`` but ``duration_s``."""
    load: _Positive | None = None
    """Share of what the fleet can serve within its targets, as ``planner.capacity`` has it; None: ``recipe.rate``."""
    plain: bool = False
    """All requests are for the plain base that their adapter has."""


class FunctionsLoad(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="functions"
):
    """Azure's functions as adapters, with the lengths of ServeGen's clients: ``planner.study.hours``."""

    load: _Positive
    """As of ``SyntheticLoad``; holds for the time that counts, warm-up included."""
    cv: _Positive
    """Of an adapter's gaps within a minute."""
    adapters: dict[str, _AtLeastOne]
    """By base."""
    pools: dict[str, str]
    """Of ServeGen's clients, by base."""
    functions: str = "notebooks/data/maf2019_500_minutes.parquet"
    lengths: str = "notebooks/data/servegen_length_quantiles.parquet"


class TraceLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="trace"):
    """A Parquet trace with bases and lengths, from its beginning: planned on, warm-up, counted."""

    path: str


Load = SyntheticLoad | FunctionsLoad | TraceLoad


class Experiment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    gpus: _AtLeastOne
    """Devices of one host; with ``device: cpu`` ranks."""
    gpu: str
    """Their type in the profiles."""
    bases: Annotated[tuple[FleetBase, ...], msgspec.Meta(min_length=1)]
    profiles: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """Shipped names or files; where two say the same thing, the later one holds."""
    loads: dict[str, Load]
    placements: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """``planner``; a baseline's name; ``best N baselines`` by the exact simulator, of those not named; ``fewest for
    99%``: the planner's on as few devices as suffice by the exact simulator, and on one less; a plan's file (.json,
    .yaml); ``2x1`` (tp 2, pp 1): groups of this shape, all bases in each; ``1x1 apart``: bases in turn."""
    device: str = "cuda"
    """``cuda`` or ``cpu``."""
    dtype: str = "auto"
    threads: _AtLeastOne | None = None
    """torch threads of each rank on the CPU."""
    engine: EngineConfig = msgspec.field(default_factory=EngineConfig)
    memory_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.85
    """Share of a device's memory for weights, activations and arenas of all its replicas; the rest is for contexts
    and graphs of their processes."""
    lora_ranks: tuple[_AtLeastOne, ...] = (8, 16, 32, 64)
    """Of the adapters of a base, by name, in turn."""
    turn_s: _NotNegative = 0.0
    """Between two turns of bases that share devices, for the prediction: as ``python -m loraplex.model_runner.turns``
    measures it."""
    planning_s: _Positive = 120.0
    """Of arrivals, before those that are measured, which planner and baselines see."""
    warm_s: _NotNegative = 10.0
    """Of arrivals that are sent and not counted."""
    seconds: _Positive = 60.0
    """Of arrivals that count."""
    targets: dict[str, Target] = {}
    """By base; of those not named ``slo_scale`` times what a lone request of median lengths takes in the base's
    smallest shape."""
    slo_scale: _Positive = 5.0
    evaluations: _AtLeastOne = 300
    """Of the planner's search."""
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def measured_s(self) -> float:
        return self.warm_s + self.seconds

    @property
    def replica_engine(self) -> EngineConfig:
        """All adapters stay in host memory."""
        return msgspec.structs.replace(self.engine, max_host_bytes=sys.maxsize)

    @property
    def steps_in_flight(self) -> int:
        """Of a replica, as the simulators count them."""
        return 1 if self.device == "cpu" else 2


def read_experiment(path: str | os.PathLike[str], overrides: str | None = None) -> Experiment:
    """``overrides``: JSON of fields that take the place of the file's. BadConfig naming file and field."""
    try:
        fields = msgspec.json.decode(Path(path).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise BadConfig(f"{os.fspath(path)}: not an experiment: {error}", param="experiment") from error
    try:
        given = {} if overrides is None else msgspec.json.decode(overrides, type=dict[str, Any])
        experiment = msgspec.convert({**fields, **given}, Experiment)
    except msgspec.MsgspecError as error:
        raise BadConfig(f"{os.fspath(path)}: {error}", param="experiment") from error
    check(experiment)
    return experiment


def check(experiment: Experiment) -> None:
    """BadConfig where fields contradict each other."""
    names = [base.name for base in experiment.bases]
    if len(set(names)) < len(names):
        raise BadConfig("bases: a name comes twice", param="bases")
    if experiment.device not in ("cpu", "cuda"):
        raise BadConfig(f"device {experiment.device!r}: cpu or cuda", param="device")
    if not experiment.lora_ranks:
        raise BadConfig("give at least one LoRA rank", param="lora_ranks")
    for name, load in experiment.loads.items():
        bases = {*load.adapters, *load.pools} if isinstance(load, FunctionsLoad) else set()
        if isinstance(load, FunctionsLoad) and load.adapters.keys() != load.pools.keys():
            raise BadConfig(f"loads.{name}: adapters and pools name different bases", param="loads")
        if unknown := sorted(bases - set(names)):
            raise BadConfig(f"loads.{name}: the fleet has no base {unknown[0]!r}", param="loads")
    if unknown := sorted(set(experiment.targets) - set(names)):
        raise BadConfig(f"targets: the fleet has no base {unknown[0]!r}", param="targets")
