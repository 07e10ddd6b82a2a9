"""An engine that remembers its steps: what each had to do and how long it took; priced when the clock has stopped.

Costs two clock reads a step while it runs. Called by ``session``.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from loraplex.core.adapter import AdapterManifest
from loraplex.core.ids import Digest
from loraplex.core.plan import Shape
from loraplex.core.request import RequestOutput
from loraplex.core.step import Executor, StepPlan, StepResult
from loraplex.cost.ceilings import Ceilings, FloatArray
from loraplex.cost.roofline import HIDDEN_PARTS, RooflineCost, stage_costs
from loraplex.cost.step_cost import StepComposition
from loraplex.cost.work import AdapterWork, IntArray, StepWork, step_work
from loraplex.engine import Engine, EngineConfig
from loraplex.engine.instructions import Instructions

BoolArray = npt.NDArray[np.bool_]


class PhaseEta(msgspec.Struct, frozen=True, kw_only=True):
    """Some of the steps of a run."""

    steps: int
    tokens: int
    """Of those steps: prompt tokens and decode tokens."""
    measured_s: float
    ideal_s: float
    eta: float
    """ideal_s / measured_s."""
    ideal_shares: dict[str, float]
    """Part -> its share of ``ideal_s``."""


class EtaReport(msgspec.Struct, frozen=True, kw_only=True):
    """How near the steps came to the ideal of ``loraplex.cost.roofline``. A step lasts from the end of the one before
    it (or from its planning, when nothing was under way) to its own end: what the engine does in between counts."""

    ceilings: str
    ceilings_source: str
    eta: float
    """Sum of the ideal times / sum of the measured times."""
    eta_by_tokens: float
    """Mean of each step's own ratio, weighted by its tokens."""
    decode: PhaseEta | None
    """Steps in which every row decodes one token; None without one."""
    prefill: PhaseEta | None
    """All others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """All rows of the recorded steps, (B,) each, as ``cost.work.step_work`` takes them."""

    step: IntArray
    start: IntArray
    num_tokens: IntArray
    samples: BoolArray
    adapter: IntArray


class RecordingEngine(Engine):
    def __init__(
        self, config: EngineConfig, executor: Executor, *, itemsize: int, shape: Shape, last_step: int = 0
    ) -> None:
        """``itemsize``: bytes of an element of KV and adapters; ``shape``: of the executor's group. Steps are numbered
        from ``last_step`` + 1: to an executor that outlives engines, ids only grow."""
        super().__init__(config, model=executor.model, arena=executor.arena, num_stages=executor.num_stages)
        self._step_id = last_step
        self._spec = executor.model
        self._itemsize = itemsize
        self._shape = shape
        self._planned: dict[int, tuple[StepPlan, float]] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._steps: list[tuple[StepPlan, float]] = []
        self._ends: list[float] = []
        self._latencies: list[float] = []
        self._overlapped: list[bool] = []
        self._last_end_s = 0.0
        self._goes_on = False
        """Requests were running when the last step ended, and since then the engine had something to plan."""
        self.num_loads = 0

    def schedule(self, now_s: float) -> Instructions:
        started_s = time.perf_counter()
        instructions = super().schedule(now_s)
        self.num_loads += len(instructions.loads)
        if instructions.plan is not None:
            self._planned[instructions.plan.step_id] = (instructions.plan, started_s)
        elif self.num_in_flight == 0:
            self._goes_on = False
        return instructions

    def complete(self, result: StepResult, now_s: float) -> tuple[RequestOutput, ...]:
        ended_s = time.perf_counter()
        plan, planned_s = self._planned.pop(result.step_id)
        began_s = self._last_end_s if self._goes_on else max(planned_s, self._last_end_s)
        self._steps.append((plan, ended_s - began_s))
        self._ends.append(ended_s)
        self._latencies.append(ended_s - planned_s)
        self._overlapped.append(planned_s < self._last_end_s)
        self._last_end_s = ended_s
        outputs = super().complete(result, now_s)
        self._goes_on = bool(self._scheduler.running)
        return outputs

    @property
    def last_step(self) -> int:
        return self._step_id

    def step_seconds(self) -> FloatArray:
        """(S,) of the recorded steps."""
        return np.array([seconds for _, seconds in self._steps])

    def step_starts(self) -> FloatArray:
        """(S,) of ``perf_counter``: when each recorded step began, as ``step_seconds`` counts."""
        return np.array(self._ends) - self.step_seconds()

    def step_latencies(self) -> FloatArray:
        """(S,) seconds from the planning of each recorded step to its end."""
        return np.array(self._latencies)

    def overlapped(self) -> BoolArray:
        """(S,) whether the step was planned while the one before it was under way."""
        return np.array(self._overlapped, dtype=bool)

    def lone(self) -> BoolArray:
        """(S,) whether no other step was under way at any time of the step."""
        overlapped = np.append(self.overlapped(), False)
        lone: BoolArray = ~(overlapped[:-1] | overlapped[1:])
        return lone

    def work(self, manifests: Sequence[AdapterManifest]) -> StepWork:
        """Of the recorded steps; ``manifests`` holds every adapter that they used."""
        by_blocks = {manifest.blocks: AdapterWork.of_blocks(manifest.blocks, self._spec) for manifest in manifests}
        rows = self._rows(manifests)
        return step_work(
            self._spec,
            step=rows.step,
            start=rows.start,
            num_tokens=rows.num_tokens,
            samples=rows.samples,
            adapter=rows.adapter,
            sizes=[by_blocks[manifest.blocks] for manifest in manifests],
            num_steps=len(self._steps),
        )

    def composition(self, manifests: Sequence[AdapterManifest]) -> StepComposition:
        """Of the recorded steps; ``manifests`` holds every adapter that they used."""
        by_blocks = {manifest.blocks: AdapterWork.of_blocks(manifest.blocks, self._spec) for manifest in manifests}
        rows = self._rows(manifests)
        return StepComposition.of_rows(
            self._spec,
            step=rows.step,
            start=rows.start,
            num_tokens=rows.num_tokens,
            adapter=rows.adapter,
            adapter_bytes=self._itemsize * np.array([by_blocks[m.blocks].elements[0] for m in manifests], dtype=float),
            num_steps=len(self._steps),
        )

    def _rows(self, manifests: Sequence[AdapterManifest]) -> "_Rows":
        number = {manifest.digest: index for index, manifest in enumerate(manifests)}
        rows = [(step, row) for step, (plan, _) in enumerate(self._steps) for row in plan.rows]

        def index(digest: Digest | None) -> int:
            return -1 if digest is None else number[digest]

        return _Rows(
            step=np.array([step for step, _ in rows], dtype=np.int64),
            start=np.array([row.start for _, row in rows], dtype=np.int64),
            num_tokens=np.array([len(row.token_ids) for _, row in rows], dtype=np.int64),
            samples=np.array([row.samples for _, row in rows], dtype=bool),
            adapter=np.array([index(row.adapter) for _, row in rows], dtype=np.int64),
        )

    def eta(self, manifests: Sequence[AdapterManifest], ceilings: Ceilings) -> EtaReport:
        """Prices the recorded steps (at least one), by the slowest stage of a pipeline."""
        work = self.work(manifests)
        stages = stage_costs(self._spec, work, ceilings, self._shape, itemsize=self._itemsize)
        cost = max(stages, key=lambda stage: float(stage.ideal_s.sum()))
        num_rows = np.array([len(plan.rows) for plan, _ in self._steps])
        decodes = (work.num_tokens == num_rows) & (work.num_sampled == num_rows)
        return eta_report(work, cost, self.step_seconds(), decodes, ceilings)


def eta_report(
    work: StepWork, cost: RooflineCost, measured_s: FloatArray, decodes: BoolArray, ceilings: Ceilings
) -> EtaReport:
    """``decodes``: (S,) bool, the steps that only decode."""
    ideal_s, tokens = cost.ideal_s, work.num_tokens

    def phase(chosen: BoolArray) -> PhaseEta | None:
        if not chosen.any():
            return None
        ideal, measured = float(ideal_s[chosen].sum()), float(measured_s[chosen].sum())
        shares = {
            str(part): float(part_cost.seconds[chosen].sum()) / ideal
            for part, part_cost in cost.parts.items()
            if part not in HIDDEN_PARTS
        }
        return PhaseEta(
            steps=int(chosen.sum()),
            tokens=int(tokens[chosen].sum()),
            measured_s=measured,
            ideal_s=ideal,
            eta=ideal / measured,
            ideal_shares={part: share for part, share in shares.items() if share > 0},
        )

    return EtaReport(
        ceilings=ceilings.name,
        ceilings_source=ceilings.source,
        eta=float(ideal_s.sum() / measured_s.sum()),
        eta_by_tokens=float((tokens * ideal_s / measured_s).sum() / tokens.sum()),
        decode=phase(decodes),
        prefill=phase(~decodes),
    )
