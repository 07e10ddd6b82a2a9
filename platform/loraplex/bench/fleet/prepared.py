"""A prepared experiment as a file: arrivals, plans, pages and predictions; all that a measurement needs. Pure data.

Made by ``prepare``, run by ``measure``.
"""

import hashlib
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from loraplex.bench.fleet.options import Experiment, Target
from loraplex.bench.whole_file import write_whole
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.cost.profile import CostProfile
from loraplex.simulator.types import AdapterSize
from loraplex.traces.arrivals import AdapterName, Arrivals

Seconds = list[float | None]
"""None: not served."""


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """R requests that are sent, in order, those that warm up among them. Columns are of R entries."""

    adapters: list[tuple[str, str, str, int]]
    """(Tenant, base, name, LoRA rank); base and tenant always said."""
    bases: list[str]
    tenants: list[str]
    arrival_s: list[float]
    adapter: list[int]
    """-1: the plain base."""
    base: list[int]
    tenant: list[int]
    prompt_tokens: list[int]
    output_tokens: list[int]
    counts_from_s: float
    """Requests that arrive earlier prime and warm up."""
    load: str
    """In words: rate, load."""

    @classmethod
    def of(cls, arrivals: Arrivals, sizes: tuple[AdapterSize, ...], *, counts_from_s: float, load: str) -> Self:
        return cls(
            adapters=[
                (name.tenant or "", name.base_model or "", name.name, size.lora_rank)
                for name, size in zip(arrivals.adapters, sizes, strict=True)
            ],
            bases=list(arrivals.base_models),
            tenants=list(arrivals.tenants),
            arrival_s=[round(at_s, 6) for at_s in arrivals.arrival_s.tolist()],
            adapter=arrivals.adapter.tolist(),
            base=arrivals.base_model.tolist(),
            tenant=arrivals.tenant.tolist(),
            prompt_tokens=arrivals.prompt_tokens.tolist(),
            output_tokens=arrivals.output_tokens.tolist(),
            counts_from_s=counts_from_s,
            load=load,
        )

    @property
    def arrivals(self) -> Arrivals:
        def column(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
            return np.array(values, dtype=np.int32)

        return Arrivals(
            origin_s=0.0,
            arrival_s=np.array(self.arrival_s, dtype=np.float64),
            adapter=column(self.adapter),
            base_model=column(self.base),
            tenant=column(self.tenant),
            prompt_tokens=column(self.prompt_tokens),
            output_tokens=column(self.output_tokens),
            adapters=tuple(AdapterName(tenant, base, name) for tenant, base, name, _ in self.adapters),
            base_models=tuple(self.bases),
            tenants=tuple(self.tenants),
        )

    @property
    def sizes(self) -> tuple[AdapterSize, ...]:
        return tuple(AdapterSize(lora_rank=rank) for *_, rank in self.adapters)


class Predicted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By the exact simulator; of all requests of the workload."""

    ttft_s: Seconds
    tpot_s: Seconds


class Cell(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One plan under one workload."""

    workload: str
    placements: tuple[str, ...]
    """Names of those that came to this plan."""
    settings: tuple[str, ...]
    plan: Plan
    pages: list[list[int]]
    """Of the arena, of each base of each group, as the simulator has it."""
    predicted: Predicted
    lone_ttft_s: dict[str, float]
    """Predicted of a lone request of ``LONE_TOKENS``, by base."""


LONE_TOKENS = (64, 2)
"""Prompt and output tokens of the requests that tell what a first token takes beside its step."""


class PreparedFleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    experiment: Experiment
    targets: dict[str, Target]
    profile: CostProfile
    """The router's: bases and devices of the fleet."""
    workloads: dict[str, Workload]
    cells: list[Cell]

    @classmethod
    def load(cls, path: Path) -> Self:
        """BadConfig naming the file."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise BadConfig(f"{path}: not a prepared experiment: {error}", param="prepared") from error

    def write(self, path: Path) -> None:
        write_whole(path, msgspec.json.encode(self) + b"\n")

    @property
    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


def groups_line(plan: Plan) -> str:
    """``8b+1b tp1 pp1, 8b tp1 pp1``."""
    return ", ".join(
        f"{'+'.join(base.base_model_id for base in group.bases)} tp{group.shape.tp} pp{group.shape.pp}"
        for group in plan.groups
    )


def lone_requests(
    bases: tuple[BaseModelId, ...], *, count: int, gap_s: float, prompt_tokens: int, output_tokens: int
) -> Arrivals:
    """``count`` for each plain base in turn, each after a gap in which the one before it has long ended."""
    size = count * len(bases)
    turn = np.arange(size, dtype=np.int32)
    return Arrivals(
        origin_s=0.0,
        arrival_s=gap_s * np.arange(size, dtype=np.float64),
        adapter=np.full(size, -1, dtype=np.int32),
        base_model=turn % len(bases),
        tenant=np.zeros(size, dtype=np.int32),
        prompt_tokens=np.full(size, prompt_tokens, dtype=np.int32),
        output_tokens=np.full(size, output_tokens, dtype=np.int32),
        adapters=(),
        base_models=bases,
        tenants=("lone",),
    )
