"""What is simulated (``SimulationInput``) and what came of it (``SimulationResult``), the same for both simulators.

Input says nothing that a simulator could find out by itself; costs are numbers, not models. Made by ``inputs`` (from a
plan, a trace and cost profiles), by ``planner`` and by tests; knows no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import numpy as np
import numpy.typing as npt

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan, Shape
from loraplex.engine import EngineConfig
from loraplex.router.config import RouterConfig
from loraplex.traces.arrivals import Arrivals

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Coefficients of a step's seconds: not negative, of one replica on its whole group (tp and pp included).

    seconds = fixed + prefill_token * (prompt tokens computed) + prefill_pair * (query-key pairs of those tokens)
    + decode_row * (rows that compute one token) + kv_token * (context tokens of those rows)
    + adapter_byte * (bytes per GPU of the distinct adapters in the step) + lora_token * (tokens that have an adapter).
    A chunk of c tokens that starts at position s has c * s + c * (c + 1) / 2 pairs; a decode row at position p (its
    own token among them) has p + 1 context tokens.
    """

    fixed_s: float
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    decode_row_s: float = 0.0
    kv_token_s: float = 0.0
    adapter_byte_s: float = 0.0
    lora_token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCost:
    """What one base costs on one GPU type in one shape. Bytes are of the GPU that holds most."""

    step: StepTimes
    stage_s: tuple[float, ...] = ()
    """Seconds of each of ``shape.pp`` stages for one request alone, needed by unbatched serving only."""
    weight_bytes: int
    memory_bytes: int
    """Of the GPU."""
    reserve_bytes: int
    """Activations, graphs and what the framework takes."""
    page_size: int = 16
    """Tokens of KV in a page."""
    page_bytes: int
    """KV of ``page_size`` tokens on one GPU."""
    host_bytes_per_s: float
    """Pinned host memory to one GPU."""
    load_fixed_s: float = 0.0
    """Of an adapter load, whatever its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostKey:
    gpu: str
    base_model_id: BaseModelId
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBytes:
    """Bytes of A and B of one adapter as they lie in the arena. On a GPU of tp shards and pp stages it takes
    (sharded / tp + replicated) / pp."""

    sharded: int
    replicated: int = 0

    def per_gpu(self, shape: Shape) -> int:
        """Rounded up."""
        elements = self.sharded + self.replicated * shape.tp
        return -(-elements // shape.num_ranks)


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
    adapters: tuple[AdapterBytes, ...]
    """Of ``arrivals.adapters``, in their order."""
    costs: Mapping[CostKey, ReplicaCost]
    """For every (gpu, base, shape) in ``plan``; others may be there too."""
    slo: Slo
    engine: EngineConfig = field(default_factory=EngineConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    serving: Serving = Serving.BATCHED
    max_in_flight: int = 1
    """Steps that a replica plans ahead, 1 or 2: with 2 a step starts at the very end of the one before it, and what
    arrives meanwhile waits one step longer. Unbatched: ignored."""
    overhead_s: float = 0.0
    """Added to each request's TTFT: what neither router nor engine knows of (network, tokenizer)."""
    warm_adapters: bool = False
    """Adapters that a replica lists lie in its arena at the start, in the plan's order, as long as there is room in
    half of it."""
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
