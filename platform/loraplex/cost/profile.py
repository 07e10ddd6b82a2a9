"""Cost profiles: files that say what steps, memory and loads cost for (base, GPU type, shape).

Owns the format (JSON or YAML) and its checks. Profiles that come with the package lie in ``profiles/``; others are
written by ``loraplex profile``. Called by simulator, planner and profiler.
"""

import dataclasses
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Literal, Self, TypeVar

import msgspec

from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.plan import Shape
from loraplex.cost.loads import LoadRates, Tier
from loraplex.cost.memory import DEFAULT_MEMORY_FRACTION, MemoryModel, memory_model, whole_adapter_bytes
from loraplex.cost.step_cost import StepCost

_SUFFIXES = (".json", ".yaml", ".yml")

_Entry = TypeVar("_Entry", "GpuProfile", "BaseProfile")


class GpuProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One type of GPU (or a CPU)."""

    name: str
    memory_bytes: int
    loads: LoadRates
    source: Literal["analytic", "measured"]


class BaseProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: ModelSpec
    itemsize: int
    """Bytes of a weight, of KV and of an adapter's element."""

    @property
    def name(self) -> str:
        return self.model.base_model_id


class HeldOutError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """|predicted - measured| / measured over steps that the fit has not seen."""

    steps: int
    median: float
    p90: float
    total: float
    """|sum predicted - sum measured| / sum measured: what a long run sees."""


class StepProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one base on one type of GPU in one shape."""

    base: str
    gpu: str
    shape: Shape
    source: Literal["analytic", "measured"]
    note: str
    """Analytic: from what. Measured: on what, with which software."""
    cost: StepCost
    held_out: HeldOutError | None = None
    """None: analytic."""


class CostProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Immutable. Names of bases and GPUs are those of the plan and the fleet."""

    format: Literal[1] = 1
    gpus: tuple[GpuProfile, ...]
    bases: tuple[BaseProfile, ...]
    steps: tuple[StepProfile, ...]

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """A shipped profile by name (``h100-80gb``), or a JSON or YAML file. BadConfig: one line with file and key."""
        text = str(name_or_path)
        if not text.endswith(_SUFFIXES):
            shipped = resources.files("loraplex.cost") / "profiles" / f"{text}.json"
            if not shipped.is_file():
                known = ", ".join(shipped_profiles())
                raise BadConfig(f"cost profile {text!r} is not known (known: {known}; or a .json or .yaml file)")
            return cls.parse(shipped.read_bytes(), where=text)
        try:
            return cls.parse(Path(name_or_path).read_bytes(), where=text)
        except OSError as error:
            raise BadConfig(f"{text}: cannot be read: {error.strerror}") from error

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Self:
        """``where``: the file, for messages; YAML if it ends so."""
        decode = msgspec.yaml.decode if where.endswith((".yaml", ".yml")) else msgspec.json.decode
        try:
            profile = decode(data, type=cls)
        except msgspec.DecodeError as error:
            raise BadConfig(f"{where}: not a cost profile: {error}") from error
        profile._check(where)
        return profile

    @classmethod
    def joined(cls, profiles: Iterable[Self]) -> Self:
        """All of ``profiles`` in one; where two say the same thing, the later one holds."""
        gpus, bases, steps = {}, {}, {}
        for profile in profiles:
            gpus.update({gpu.name: gpu for gpu in profile.gpus})
            bases.update({base.name: base for base in profile.bases})
            steps.update({(step.base, step.gpu, step.shape): step for step in profile.steps})
        return cls(gpus=tuple(gpus.values()), bases=tuple(bases.values()), steps=tuple(steps.values()))

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    def renamed(self, base: str, base_model_id: BaseModelId) -> Self:
        """The same with ``base`` under another name, e.g. the one that a fleet's config gives it."""
        known = self.base(base)
        model = msgspec.structs.replace(known, model=_with_id(known.model, base_model_id))
        return type(self)(
            gpus=self.gpus,
            bases=tuple(model if entry is known else entry for entry in self.bases),
            steps=tuple(
                msgspec.structs.replace(step, base=str(base_model_id)) if step.base == base else step
                for step in self.steps
            ),
        )

    def slowed(self, factor: float) -> Self:
        """The same machines at 1 / ``factor`` of their speed: every step and load takes ``factor`` times as long."""
        if factor == 1:
            return self
        return type(self)(
            gpus=tuple(msgspec.structs.replace(gpu, loads=gpu.loads.slowed(factor)) for gpu in self.gpus),
            bases=self.bases,
            steps=tuple(
                msgspec.structs.replace(
                    step, cost=step.cost.slowed(factor), note=f"{step.note}; all times x {factor:g}"
                )
                for step in self.steps
            ),
        )

    def gpu(self, name: str) -> GpuProfile:
        """BadConfig when there is none of this name."""
        return _named(name, self.gpus, "GPU")

    def base(self, name: str) -> BaseProfile:
        """BadConfig when there is none of this name."""
        return _named(name, self.bases, "base")

    def shapes(self, base: str, gpu: str) -> tuple[Shape, ...]:
        """For which ``step_cost`` is known, in the order of the file. BadConfig for an unknown base or GPU."""
        self.base(base), self.gpu(gpu)
        return tuple(step.shape for step in self.steps if (step.base, step.gpu) == (base, gpu))

    def step(self, base: str, gpu: str, shape: Shape) -> StepProfile:
        """BadConfig naming what is not known."""
        for step in self.steps:
            if (step.base, step.gpu, step.shape) == (base, gpu, shape):
                return step
        known = ", ".join(f"({s.tp}, {s.pp})" for s in self.shapes(base, gpu))
        raise BadConfig(
            f"no step cost of {base} on {gpu} in shape ({shape.tp}, {shape.pp}) (known: {known or 'none'})",
            param="shape",
        )

    def step_cost(self, base: str, gpu: str, shape: Shape) -> StepCost:
        """Seconds of a step. BadConfig naming what is not known."""
        return self.step(base, gpu, shape).cost

    def memory(
        self,
        base: str,
        gpu: str,
        shape: Shape,
        *,
        memory_fraction: float = DEFAULT_MEMORY_FRACTION,
        max_step_tokens: int = 8192,
        max_rows: int = 256,
    ) -> MemoryModel:
        """What the base leaves on each GPU of a group for KV and adapters. BadConfig for an unknown base or GPU."""
        known = self.base(base)
        return memory_model(
            known.model,
            shape,
            gpu_bytes=self.gpu(gpu).memory_bytes,
            itemsize=known.itemsize,
            memory_fraction=memory_fraction,
            max_step_tokens=max_step_tokens,
            max_rows=max_rows,
        )

    def adapter_bytes(self, base: str, lora_rank: int, modules: Iterable[str] = LORA_MODULES) -> int:
        """Of a whole adapter: for ``StepComposition.adapter_bytes`` and ``load_time``."""
        known = self.base(base)
        return whole_adapter_bytes(known.model, lora_rank, modules, itemsize=known.itemsize)

    def load_time(self, gpu: str, num_bytes: float, source: Tier = Tier.HOST, *, shape: Shape | None = None) -> float:
        """Seconds for ``num_bytes`` (an adapter, or a base's weights) from ``source`` to a group of ``shape``."""
        return self.gpu(gpu).loads.seconds(num_bytes, source, num_gpus=1 if shape is None else shape.num_ranks)

    def _check(self, where: str) -> None:
        gpus, bases = {gpu.name for gpu in self.gpus}, {base.name for base in self.bases}
        seen = set()
        for index, step in enumerate(self.steps):
            key = f"{where}: steps[{index}]"
            if step.gpu not in gpus:
                raise BadConfig(f"{key}.gpu: {step.gpu!r} is not among the gpus of this file")
            if step.base not in bases:
                raise BadConfig(f"{key}.base: {step.base!r} is not among the bases of this file")
            if step.shape.tp < 1 or step.shape.pp < 1:
                raise BadConfig(f"{key}.shape: tp and pp must be 1 or more")
            identity = (step.base, step.gpu, step.shape)
            if identity in seen:
                raise BadConfig(f"{key}: {step.base} on {step.gpu} in this shape comes twice")
            seen.add(identity)
            step.cost.check(f"{key}.cost")


def shipped_profiles() -> tuple[str, ...]:
    """Names for ``CostProfile.load``."""
    folder = resources.files("loraplex.cost") / "profiles"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def _with_id(model: ModelSpec, base_model_id: BaseModelId) -> ModelSpec:
    return dataclasses.replace(model, base_model_id=base_model_id)


def _named(name: str, entries: tuple[_Entry, ...], kind: str) -> _Entry:
    for entry in entries:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in entries)
    raise BadConfig(f"the cost profile has no {kind} {name!r} (known: {known})", param=kind.lower())
