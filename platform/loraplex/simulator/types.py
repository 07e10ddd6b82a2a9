"""What is simulated (``SimulationInput``) and what came of it (``SimulationResult``), the same for both simulators.

Input says nothing that a simulator could find out by itself; costs are numbers, not models. Made by ``inputs`` (from a
plan, a trace and cost profiles), by ``planner`` and by tests; knows no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Self

import numpy as np
import numpy.typing as npt

from loraplex.core.ids import BaseModelId
from loraplex.core.model import LORA_MODULES, ModelSpec
from loraplex.core.plan import Plan, Shape
from loraplex.cost.loads import LoadRates, Tier
from loraplex.cost.memory import MemoryModel
from loraplex.cost.profile import CostProfile
from loraplex.cost.step_cost import StepCost
from loraplex.engine import EngineConfig
from loraplex.router.config import RouterConfig
from loraplex.traces.arrivals import Arrivals

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCost:
    """What one base costs on one GPU type in one shape."""

    model: ModelSpec
    itemsize: int = 2
    """Bytes of an adapter's element."""
    step: StepCost
    """Of a group with several stages steps overlap: one takes its latency from end to end, the next begins after its
    interval."""
    memory: MemoryModel
    loads: LoadRates
    stage_s: tuple[float, ...] = ()
    """Seconds of each of ``shape.pp`` stages for one request alone; unbatched serving needs them, nothing else does."""

    @classmethod
    def of(cls, profile: CostProfile, key: "CostKey", engine: EngineConfig) -> Self:
        """BadConfig naming what the profile does not know."""
        base, gpu = str(key.base_model_id), key.gpu
        return cls(
            model=profile.base(base).model,
            itemsize=profile.base(base).itemsize,
            step=profile.step_cost(base, gpu, key.shape),
            memory=profile.memory(
                base, gpu, key.shape, max_step_tokens=engine.max_step_tokens, max_rows=engine.max_running
            ),
            loads=profile.gpu(gpu).loads,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostKey:
    gpu: str
    base_model_id: BaseModelId
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSize:
    """An adapter of one rank."""

    lora_rank: int
    modules: tuple[str, ...] = LORA_MODULES


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Targets of a request; infinite: none."""

    ttft_s: float = np.inf
    """From arrival to the first token."""
    tpot_s: float = np.inf
    """(E2E - TTFT) / (output tokens - 1); a request of one token has none and meets it."""


class Serving(StrEnum):
    BATCHED = "batched"
    """Continuous batching, the router's policy, nothing refused but by the router's own limits."""
    UNBATCHED = "unbatched"
    """AlpaServe's contract: a request is one token, alone in each stage for ``stage_s``; it goes to the replica that
    would be free first and is refused there if it would miss the TTFT target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationInput:
    plan: Plan
    arrivals: Arrivals
    """Every request has a base (or an adapter with one), prompt and output tokens."""
    adapters: tuple[AdapterSize, ...]
    """Of ``arrivals.adapters``, in their order."""
    costs: Mapping[CostKey, ReplicaCost]
    """For every (gpu, base, shape) in ``plan``; others may be there too."""
    slo: Slo
    slo_of_base: Mapping[BaseModelId, Slo] = field(default_factory=dict)
    """Instead of ``slo``, for the requests of some bases."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    serving: Serving = Serving.BATCHED
    max_in_flight: int = 2
    """Steps that a replica has planned and not finished, 1 or 2; with pp stages pp - 1 more. With 2 a step is planned
    while the one before it runs: its adapters load meanwhile, and what arrives waits for one more step. Unbatched:
    ignored."""
    turn_s: float = 0.0
    """From the end of a turn to the beginning of the next one's first step, where another base waited for it. In a
    pipeline no less than ``StepCost.alone_s``."""
    overhead_s: float = 0.0
    """Added to each request's TTFT: what neither router nor engine knows of (network, tokenizer)."""
    adapter_tier: Tier = Tier.HOST
    """Where each replica finds an adapter when it first needs it; once fetched, it stays in its host memory."""
    score_from_s: float = 0.0
    score_until_s: float = np.inf
    """Requests that arrive in [from, until) count in the result's figures; all are simulated."""


class Outcome(IntEnum):
    SERVED = 0
    REFUSED = 1
    """By the router (queue full, waited too long) or, unbatched, since it would have missed its target."""
    IMPOSSIBLE = 2
    """No replica of its base can ever hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUse:
    """One group over the whole run."""

    name: str
    num_gpus: int
    busy_s: float
    """Time in steps."""
    num_steps: int
    num_requests: int
    num_preemptions: int
    num_loads: int
    """Adapters copied into the arena."""
    load_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of some of the requests. NaN where there is nothing to average."""

    num_requests: int
    num_good: int
    """Served within all targets."""
    num_served: int
    attainment: float
    """num_good / num_requests."""
    ttft_attainment: float
    """Share of all requests that met the TTFT target."""
    tpot_attainment: float
    goodput_per_s: float
    """num_good per second of the scored span."""
    ttft_s: Mapping[str, float]
    """``p50``, ``p90``, ``p99``, ``mean``, of those served."""
    tpot_s: Mapping[str, float]
    """The same; of those served that have two tokens or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """R requests, in the order of the arrivals."""

    ttft_s: FloatArray
    """[R] seconds; infinite for those not served."""
    tpot_s: FloatArray
    """[R] seconds; 0 for one output token, infinite for those not served."""
    outcome: npt.NDArray[np.int8]
    """[R] of ``Outcome``."""
    group: IntArray
    """[R] index into ``groups``; -1 where it reached none."""
    good: npt.NDArray[np.bool_]
    """[R] served within all targets."""
    groups: tuple[GroupUse, ...]
    """In the plan's order."""
    end_s: float
    """When the last request ended."""
    gpu_use: float
    """GPU seconds in steps over GPU seconds until ``end_s``."""
    score: Score
    """Of the requests in the scored span."""
    tenant_attainment: FloatArray
    """[tenants of the trace]; NaN for one without a request in the scored span."""
    adapter_attainment: FloatArray
    """[adapters of the trace]; likewise."""
