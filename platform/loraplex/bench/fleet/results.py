"""What a fleet was measured to do, beside what was predicted: rows of one file, written after each.

Owns the file's format. Called by ``measure``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from loraplex.bench.fleet.options import Experiment, Target
from loraplex.bench.fleet.prepared import Cell, PreparedFleet, Seconds, Workload
from loraplex.bench.whole_file import write_whole
from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.cost.samples import Samples
from loraplex.loadgen.comparison import Compared, compare
from loraplex.loadgen.outcomes import Mask, Outcomes
from loraplex.simulator.types import FloatArray, Slo

ALL = "all"
"""In a row's figures: the requests of all bases."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    measured: float | None
    """None: no request was served."""
    predicted: float | None
    difference: float | None
    """Predicted against measured: of shares the difference, of seconds the relative one."""


class Lateness(msgspec.Struct, frozen=True, kw_only=True):
    """Of the sender: milliseconds from when a request was due to when it went out."""

    p50_ms: float
    p99_ms: float
    max_ms: float


class StepTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of one kind, together, of one base."""

    steps: int
    time_s: Figure
    """Predicted by the profile, of the very steps that ran."""


class FleetRow(msgspec.Struct, frozen=True, kw_only=True):
    """One plan under one workload; of the requests that count."""

    workload: str
    placements: tuple[str, ...]
    settings: tuple[str, ...]
    groups: str
    load: str
    requests: int
    unanswered: int
    errors: dict[str, int]
    """Why they were not answered, and how often."""
    commit: str | None
    device_name: str
    torch_version: str
    overhead_s: dict[str, float]
    """By base: what the first token of a lone request takes beside its step; added to what is predicted."""
    lateness: Lateness
    figures: dict[str, dict[str, Figure]]
    """By base, and of ``all``: attainment, ``ttft_mean_s``, percentiles of TTFT and TPOT."""
    ttft_s: Seconds
    """Of each request, in the order of the workload, for paired comparisons."""
    tpot_s: Seconds
    steps: dict[str, dict[str, StepTotal]] = {}
    """By base, steps of ``decode`` and those ``with prompts``, if they were recorded. Where bases take turns a step
    lasts from the base's last one on, the other's included; predicted is the pace, also of a pipeline's lone steps."""
    good: str
    """``1`` for each request that met all targets of its base, ``0`` for the others."""


class FleetTable(msgspec.Struct, kw_only=True):
    """What the file holds."""

    experiment: Experiment
    targets: dict[str, Target]
    prepared: str
    """Digest of the prepared experiment."""
    rows: list[FleetRow] = []
    left: list[str] = []
    """Cells for which the budget did not last."""

    @classmethod
    def open(cls, path: Path, prepared: PreparedFleet) -> Self:
        """The file's, or a new one. BadConfig when the file is of another prepared experiment, or no such file."""
        if not path.exists():
            return cls(experiment=prepared.experiment, targets=prepared.targets, prepared=prepared.digest)
        table = cls.load(path)
        if table.prepared != prepared.digest:
            raise BadConfig(f"{path}: holds rows of another prepared experiment; choose another file", param="results")
        return table

    @classmethod
    def load(cls, path: Path) -> Self:
        """BadConfig."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError) as error:
            raise BadConfig(f"{path}: not the results of a fleet: {error}", param="results") from error

    def holds(self, cell: Cell) -> bool:
        return any((row.workload, row.placements) == (cell.workload, cell.placements) for row in self.rows)

    def write(self, path: Path) -> None:
        """Whole at any time."""
        write_whole(path, msgspec.json.encode(self) + b"\n")


def figures_of(
    prepared: PreparedFleet, cell: Cell, measured: Outcomes, overhead_s: Mapping[str, float]
) -> dict[str, dict[str, Figure]]:
    """``measured``: of all requests of the cell's workload."""
    workload = prepared.workloads[cell.workload]
    predicted = predicted_outcomes(workload, cell, measured, overhead_s)
    counted = measured.at_s >= workload.counts_from_s
    found: dict[str, dict[str, Figure]] = {}
    for index, base in enumerate(workload.bases):
        rows = counted & (np.array(workload.base) == index)
        if rows.any():
            sides = [side.of_rows(rows) for side in (measured, predicted)]
            found[base] = _named(compare(sides[0], sides[1], _slo(prepared, base)), *sides)
    sides = [side.of_rows(counted) for side in (measured, predicted)]
    shares = Compared(
        name="attainment",
        measured=float(np.mean(good_requests(prepared, cell, measured)[counted])),
        predicted=float(np.mean(good_requests(prepared, cell, predicted)[counted])),
    )
    found[ALL] = _named((shares, *compare(sides[0], sides[1], None)), *sides)
    return found


def step_totals(
    prepared: PreparedFleet, routes: Sequence[ReplicaRoute], steps: Mapping[ReplicaId, Samples]
) -> dict[str, dict[str, StepTotal]]:
    """``steps``: of each replica, of ``routes``; the profile's prediction beside them."""
    of_kind: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for route in routes:
        if route.replica_id not in steps:
            continue
        composition, measured_s = steps[route.replica_id].arrays()
        cost = prepared.profile.step_cost(route.base_model_id, prepared.experiment.gpu, route.shape)
        predicted_s = cost.interval_s(composition)
        for kind, rows in (("decode", composition.prefill_rows == 0), ("with prompts", composition.prefill_rows > 0)):
            if rows.any():
                sums = int(np.count_nonzero(rows)), float(measured_s[rows].sum()), float(predicted_s[rows].sum())
                of_kind.setdefault((route.base_model_id, kind), []).append(sums)
    found: dict[str, dict[str, StepTotal]] = {}
    for (base, kind), replicas in of_kind.items():
        count, measured, predicted = (sum(column) for column in zip(*replicas, strict=True))
        time_s = _figure(Compared(name="time_s", measured=measured, predicted=predicted))
        found.setdefault(base, {})[kind] = StepTotal(steps=int(count), time_s=time_s)
    return found


def predicted_outcomes(workload: Workload, cell: Cell, measured: Outcomes, overhead_s: Mapping[str, float]) -> Outcomes:
    added = np.array([overhead_s[BaseModelId(base)] for base in workload.bases])[np.array(workload.base)]
    return Outcomes(
        at_s=measured.at_s,
        tenants=measured.tenants,
        tenant=measured.tenant,
        ttft_s=_array(cell.predicted.ttft_s) + added,
        tpot_s=_array(cell.predicted.tpot_s),
    )


def good_requests(prepared: PreparedFleet, cell: Cell, outcomes: Outcomes) -> Mask:
    """Of all requests of the cell's workload: each by the targets of its base."""
    workload = prepared.workloads[cell.workload]
    good = np.zeros(len(outcomes), dtype=np.bool_)
    for index, base in enumerate(workload.bases):
        own = np.array(workload.base) == index
        if own.any():
            good |= own & outcomes.good(_slo(prepared, base))
    return good


def _slo(prepared: PreparedFleet, base: str) -> Slo:
    given = prepared.targets[base]
    return Slo(ttft_s=given.ttft_s, tpot_s=given.tpot_s)


def seconds_of(values: FloatArray, rows: Mask) -> Seconds:
    return [round(value, 6) if np.isfinite(value) else None for value in values[rows].tolist()]


def _array(values: Seconds) -> FloatArray:
    return np.array([np.inf if value is None else value for value in values], dtype=np.float64)


def _named(figures: tuple[Compared, ...], measured: Outcomes, predicted: Outcomes) -> dict[str, Figure]:
    means = [float(side.ttft_s[side.served].mean()) if side.served.any() else None for side in (measured, predicted)]
    all_figures = (figures[0], Compared(name="ttft_mean_s", measured=means[0], predicted=means[1]), *figures[1:])
    return {one.name: _figure(one) for one in all_figures}


def _figure(one: Compared) -> Figure:
    return Figure(measured=one.measured, predicted=one.predicted, difference=one.difference)
