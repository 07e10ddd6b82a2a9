"""What a benchmark of the engine found. Pure data, the same as JSON. Made by ``session``, ``sweep`` and others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from loraplex.bench.options import EngineBenchOptions, EngineLoad, EngineSetup
from loraplex.bench.recorder import EtaReport
from loraplex.core.errors import BadConfig


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(mean=float(np.mean(values)), p50=p50, p90=p90, p99=p99)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    setup: EngineSetup
    device_name: str
    torch_version: str
    num_pages: int
    page_bytes: int
    ready_s: float | None
    """From the start of the process to the first token of a first base request; None where the system does not tell
    when a process started."""


class AdapterTraffic(msgspec.Struct, frozen=True, kw_only=True):
    pages: float
    """Of one adapter, on average."""
    stage_s: float
    """Mean time to put one adapter into host memory, before the clock."""
    loads: int
    """Copies onto the accelerator while the clock ran."""
    loads_per_s: float
    hit_rate: float
    """Share of the requests whose adapter, if any, was on the accelerator when they were admitted."""


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one engine."""

    load: EngineLoad
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_s: Percentiles
    """From the submission of a request to its first token."""
    tpot_s: Percentiles | None
    """(E2E - TTFT) / (output tokens - 1); None when requests generate a single token."""
    e2e_s: Percentiles
    steps: int
    mean_step_s: float
    """Of the executor's part alone."""
    engine_share: float
    """Part of the duration in which no step was under way. Below 0 where steps overlap."""
    preemptions: int
    adapters: AdapterTraffic | None
    """None: the plain base."""
    eta: EtaReport


class SingleTtft(msgspec.Struct, frozen=True, kw_only=True):
    """One request at a time, nothing else running."""

    input_tokens: int
    base_s: Percentiles
    warm_s: Percentiles
    """Its adapter is on the accelerator."""
    cold_s: Percentiles
    """Its adapter is in host memory only."""
    added_by_cold_s: float
    """Median cold - median warm."""


class PartTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Where the device's time went, by the names of kernels (on the CPU: of operators)."""

    steps: int
    wall_s: float
    busy_s: float
    """Time in which at least one kernel ran. On the CPU: in operators."""
    shares: dict[str, float]
    """Part -> its share of the kernels' time; largest first."""
    host_waits: dict[str, float] | None
    """Name -> calls a step by which the host waits for the device: ``cudaEventSynchronize`` is the read-back of the
    tokens. None on the CPU."""


class EngineBenchResult(msgspec.Struct, frozen=True, kw_only=True):
    options: EngineBenchOptions
    machine: Machine
    result: LoadResult
    single_ttft: SingleTtft | None
    prefill_parts: PartTimes | None
    decode_parts: PartTimes | None


class SweepRow(msgspec.Struct, frozen=True, kw_only=True):
    """One case of one round. TTFT and TPOT are medians over the requests."""

    case: str
    round: int
    adapters: int
    requests: int
    input_tokens: int
    output_tokens: int
    lora_rank: int
    """The largest one; 0 without adapters."""
    output_tokens_per_s: float
    ttft_ms: float
    tpot_ms: float | None
    eta: float
    result: LoadResult


class SweepSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of a case over its rounds."""

    case: str
    rounds: int
    adapters: int
    requests: int
    lora_rank: int
    output_tokens_per_s: float
    ttft_ms: float
    tpot_ms: float | None
    eta: float
    ratio: float | None
    """Median over the rounds of its tokens/s / those of the first case; None where that did not run."""


class SweepTable(msgspec.Struct, kw_only=True):
    """What the file holds."""

    setup: EngineSetup
    shrink: int
    commit: str | None
    machine: Machine | None = None
    rows: list[SweepRow] = []
    single_ttft: SingleTtft | None = None
    summary: list[SweepSummary] = []
    left: list[str] = []
    """Cases for which the budget did not last."""

    @classmethod
    def load(cls, path: Path, *, param: str | None = None) -> Self:
        """Raises BadConfig, about ``param``, when ``path`` is no such file."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise BadConfig(f"{path}: not the table of a sweep: {error}", param=param) from error
