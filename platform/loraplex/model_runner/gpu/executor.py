"""``core.step.Executor`` on a CUDA device: owns arena, adapter tiers, page tables and sampler state, and runs steps.

Decides nothing. A step whose rows all decode runs as a CUDA graph keyed by sizes alone; other steps run eagerly. Two
steps may be in flight: tokens stay on the device, and ``collect`` waits for the read-back of the oldest only. Driven by
the engine loop of a replica, from one thread; ``stage_adapter`` and ``unstage_adapter`` from any.
"""

import time
from collections import deque
from dataclasses import dataclass, replace
from functools import partial

import torch

from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import Row, SampledToken, StepPlan, StepResult
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.executor_base import ExecutorBase, TokenSampler
from loraplex.model_runner.frequencies import model_frequencies
from loraplex.model_runner.gpu.adapters import GpuAdapters
from loraplex.model_runner.gpu.decoder import GpuDecoder
from loraplex.model_runner.gpu.graphs import GraphCache
from loraplex.model_runner.gpu.inputs import StepInputs
from loraplex.model_runner.weights import DecoderWeights

_MAX_IN_FLIGHT = 2


@dataclass(slots=True, kw_only=True)
class _InFlight:
    step_id: int
    drawn: Drawn | None
    done: torch.cuda.Event | None
    submitted_s: float


class GpuExecutor(ExecutorBase):
    def __init__(
        self,
        model: ModelSpec,
        weights: DecoderWeights,
        arena: Arena,
        sampler: TokenSampler,
        *,
        max_rows: int,
        max_step_tokens: int,
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(model, arena, sampler, max_rows=max_rows, max_step_tokens=max_step_tokens)
        device = arena.pages.device
        # No adapter is smaller than a page.
        self._adapters = GpuAdapters(model, arena, num_records=arena.spec.num_pages)
        self._inputs = StepInputs(
            model,
            arena.kv.layout,
            arena.dtype,
            device=device,
            adapters=self._adapters,
            max_rows=max_rows,
            batch_invariant=batch_invariant,
        )
        self._decoder = GpuDecoder(
            model,
            weights,
            arena,
            table=self._adapters.table,
            page_table=self._inputs.page_tables.table,
            last_token=self._inputs.last_token,
            frequencies=model_frequencies(model, device),
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
        )
        self._graphs = GraphCache(device, enabled=cuda_graphs)
        self._in_flight: deque[_InFlight] = deque()
        self._collected_s = 0.0

    @property
    def max_in_flight(self) -> int:
        return _MAX_IN_FLIGHT

    def load_adapter(self, digest: Digest, pages: tuple[int, ...], *, after_step: int = 0) -> None:
        """Starts the copy of a staged adapter into ``pages``. Conflict when it is not staged, or loaded already."""
        after = next((step.done for step in reversed(self._in_flight) if step.step_id <= after_step), None)
        self._adapters.load(digest, self._host.get(digest), pages, after=after)

    def drop_adapter(self, digest: Digest) -> None:
        self._adapters.drop(digest)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        """Enqueues the step. Conflict when it is too large, or two are in flight."""
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            raise Conflict(f"{_MAX_IN_FLIGHT} steps are in flight already")
        self._check_size(plan)
        submitted_s = time.perf_counter()
        for slot in plan.releases:
            self._sampler.release(slot)
        for start in plan.starts:
            self._sampler.start(start)
            self._inputs.page_tables.start(start.slot)
        drawn = self._run_rows(plan.rows) if plan.rows else None
        done: torch.cuda.Event | None = None
        if self._arena.pages.is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._in_flight.append(_InFlight(step_id=plan.step_id, drawn=drawn, done=done, submitted_s=submitted_s))

    def collect(self) -> StepResult:
        """Waits for the oldest step in flight. Conflict when none is. After an exception none is in flight."""
        if not self._in_flight:
            raise Conflict("no step is in flight")
        step = self._in_flight.popleft()
        tokens: tuple[SampledToken, ...] = ()
        try:
            if step.drawn is not None:
                tokens = tuple(step.drawn.result())
            elif step.done is not None:
                step.done.synchronize()
        except BaseException:
            self._in_flight.clear()
            raise
        # A step that was submitted while its predecessor ran began when that ended.
        began_s, self._collected_s = max(step.submitted_s, self._collected_s), time.perf_counter()
        return StepResult(step_id=step.step_id, tokens=tokens, duration_s=self._collected_s - began_s)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures the graphs of decode steps: of the base alone, and with adapters up to rank 16."""
        for num_rows in self._inputs.row_buckets:
            for num_tiles in (0, *self._inputs.tile_buckets(num_rows)):
                step = self._inputs.idle_decode(num_rows, num_tiles)
                self._graphs.run(step.key, partial(self._decoder.run_sampled, step))

    def close(self) -> None:
        """Frees weights and arena; the executor cannot be used afterwards. Idempotent."""
        for name in ("_graphs", "_decoder", "_inputs", "_adapters", "_arena", "_host"):
            if hasattr(self, name):
                delattr(self, name)

    def _run_rows(self, rows: tuple[Row, ...]) -> Drawn | None:
        self._inputs.page_tables.update(rows)
        slots = [row.slot for row in rows if row.samples]
        if all(len(row.token_ids) == 1 for row in rows) and len(slots) == len(rows):
            step = self._inputs.decode(rows)
            # Outside the graph, which knows no adapters.
            for arrival in step.arrivals:
                torch.cuda.current_stream().wait_event(arrival.event)
            body = partial(self._decoder.run_sampled, replace(step, arrivals=()))
            logits_BV = self._graphs.run(step.key, body)[: len(slots)]
        else:
            logits = self._decoder.run(self._inputs.mixed(rows))
            if logits is None:
                return None
            logits_BV = logits
        return self._sampler.draw(logits_BV, slots, last_token=self._inputs.last_token)
