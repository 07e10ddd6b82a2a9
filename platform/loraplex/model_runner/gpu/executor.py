"""``core.step.Executor`` on a CUDA device: owns arena, adapter tiers, page tables and sampler state, and runs steps.

Decides nothing. A step runs as a CUDA graph keyed by sizes alone, or eagerly where it is so large that the device takes
longer than the launches. Two steps may be in flight: tokens stay on the device, and ``collect`` waits for the read-back
of the oldest only. A rank of a group runs its part of each step; sums within a stage are part of the graphs, what
stages hand to each other is not. Between stages the last one's tokens come to the first on the device, where a step
needs them, without the host. A rank alone is driven by the engine loop of a replica, one of several by
``ranks.worker``: from one thread; ``stage_adapter`` and ``unstage_adapter`` from any.
"""

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.request import SamplingParams
from loraplex.core.step import Row, RowStart, SampledToken, StepPlan, StepResult
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.frequencies import model_frequencies
from loraplex.model_runner.gpu.adapters import GpuAdapters
from loraplex.model_runner.gpu.decoder import GpuDecoder
from loraplex.model_runner.gpu.graphs import GraphCache
from loraplex.model_runner.gpu.inputs import DeviceStep, StepInputs
from loraplex.model_runner.gpu.upload import upload
from loraplex.model_runner.peers import Alone, Peers
from loraplex.model_runner.rank_executor import RankExecutor, TokenSampler
from loraplex.model_runner.shard import Shard
from loraplex.model_runner.weights import DecoderWeights

_MAX_IN_FLIGHT = 2

_GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
_DRAWN = SamplingParams(max_tokens=1, seed=0, temperature=1.0)
_CUT = SamplingParams(max_tokens=1, seed=0, temperature=1.0, top_p=0.9, top_k=50)
_SAMPLING_KINDS = ((_GREEDY,), (_DRAWN,), (_CUT,), (_GREEDY, _DRAWN), (_GREEDY, _DRAWN, _CUT))


@dataclass(slots=True, kw_only=True)
class _InFlight:
    step_id: int
    drawn: Drawn | None
    done: torch.cuda.Event | None
    """Behind a step that draws nothing."""
    submitted_s: float

    def ready(self) -> bool:
        if self.drawn is not None:
            return self.drawn.ready()
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]


class GpuExecutor(RankExecutor):
    def __init__(
        self,
        shard: Shard,
        weights: DecoderWeights,
        arena: Arena,
        sampler: TokenSampler,
        *,
        max_rows: int,
        max_step_tokens: int,
        cuda_graphs: bool = True,
        graph_patience: int = 0,
        batch_invariant: bool = False,
        peers: Peers | None = None,
    ) -> None:
        """``weights`` and ``arena`` are those of ``shard``. ``peers``: the other ranks, None where there are none."""
        super().__init__(shard, arena, sampler, max_rows=max_rows, max_step_tokens=max_step_tokens)
        model, device = shard.local, arena.pages.device
        self._peers = peers or Alone()
        # No adapter is smaller than a page.
        self._adapters = GpuAdapters(model, arena, num_records=arena.spec.num_pages)
        self._inputs = StepInputs(
            model,
            arena.kv.layout,
            arena.dtype,
            device=device,
            adapters=self._adapters,
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            padded=cuda_graphs,
            batch_invariant=batch_invariant,
        )
        self._decoder = GpuDecoder(
            shard,
            weights,
            arena,
            self._peers,
            table=self._adapters.table,
            page_table=self._inputs.page_tables.table,
            last_token=self._inputs.last_token,
            frequencies=model_frequencies(model, device),
            max_rows=max_rows,
            max_parts=self._inputs.decode_cut.capacity(max_rows),
            max_step_tokens=max_step_tokens,
            batch_invariant=batch_invariant,
        )
        self._graphs = GraphCache(device, enabled=cuda_graphs, patience=graph_patience)
        self._hidden_TD: torch.Tensor | None = None
        """Of the stage before; at one address, for graphs."""
        if not shard.is_first:
            shape = (max_step_tokens, model.hidden_size)
            self._hidden_TD = torch.zeros(shape, dtype=arena.dtype, device=device)
        self._drawn_elsewhere: deque[tuple[int, ...]] = deque()
        """On the first of several stages, of each step whose tokens have not come back: whose they are."""
        self._prepared: tuple[int, DeviceStep] | None = None
        """A step's id and inputs."""
        self._in_flight: deque[_InFlight] = deque()
        self._collected_s = 0.0

    @property
    def max_in_flight(self) -> int:
        return _MAX_IN_FLIGHT

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        """Pages that this rank's part of the adapter takes. BadAdapter when it does not fit the base, BadConfig when
        pages are too small for the kernels."""
        layout = self._host.layout(manifest)
        self._adapters.check(layout)
        return layout.num_pages

    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
        """Starts the copy of a staged adapter into ``pages``. Conflict when it is not staged, or loaded already."""
        self._enter_device()
        with self._host.lend(digest) as staged:
            self._adapters.load(digest, staged, pages)

    def drop_adapter(self, digest: Digest) -> None:
        self._adapters.drop(digest)

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> None:
        """Uploads the inputs; launches nothing."""
        self._check_size(plan)
        self._enter_device()
        if plan.rows:
            self._prepared = plan.step_id, self._inputs_of(plan.rows)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        """Enqueues the step. Conflict when it is too large, or two are in flight."""
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            raise Conflict(f"{_MAX_IN_FLIGHT} steps are in flight already")
        self._check_size(plan)
        self._enter_device()
        submitted_s = time.perf_counter()
        done: torch.cuda.Event | None = None
        try:
            if self._shard.is_last:
                for slot in plan.releases:
                    self._sampler.release(slot)
                for start in plan.starts:
                    self._sampler.start(start)
            for start in plan.starts:
                self._inputs.page_tables.start(start.slot)
            drawn = self._run_rows(plan.step_id, plan.rows) if plan.rows else None
            if drawn is None and self._arena.pages.is_cuda:
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
        except BaseException:
            self._settle()
            raise
        self._in_flight.append(_InFlight(step_id=plan.step_id, drawn=drawn, done=done, submitted_s=submitted_s))

    def ready(self) -> bool:
        return bool(self._in_flight) and self._in_flight[0].ready()

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
            self._settle()
            raise
        # A step that was submitted while its predecessor ran began when that ended.
        began_s, self._collected_s = max(step.submitted_s, self._collected_s), time.perf_counter()
        return StepResult(step_id=step.step_id, tokens=tokens, duration_s=self._collected_s - began_s)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures the graphs of decode steps, and of small steps with prompts, with and without adapters; for those of
        more than 16 ranks some that serve most others. Those are captured when they have come often."""
        for step in self._inputs.idle_steps():
            body = partial(self._decoder.run_captured, step, self._hidden(step))
            logits_BV = body()
            self._graphs.capture(step.key, body)
        if self._shard.is_last:
            for kinds in _SAMPLING_KINDS:
                self._draw_once(logits_BV, kinds)

    def _draw_once(self, logits_BV: torch.Tensor, kinds: tuple[SamplingParams, ...]) -> None:
        """Compiles what a step of such rows needs."""
        slots = range(min(len(kinds), self._max_rows))
        for slot in slots:
            self._sampler.start(RowStart(slot=slot, sampling=kinds[slot], token_ids=(0,), num_prompt_tokens=1))
        self._sampler.draw(logits_BV[: len(slots)], slots, last_token=self._inputs.last_token).result()
        for slot in slots:
            self._sampler.release(slot)

    def close(self) -> None:
        """Frees weights and arena; the executor cannot be used afterwards. Idempotent."""
        self._host.close()
        for name in ("_graphs", "_decoder", "_inputs", "_adapters", "_arena", "_hidden_TD"):
            if hasattr(self, name):
                delattr(self, name)

    def _enter_device(self) -> None:
        """A thread begins on the first device, and Triton launches on the thread's."""
        device = self._arena.pages.device
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            torch.cuda.set_device(device)

    def _settle(self) -> None:
        """Waits until the device has nothing to do: what is void must not write to pages that change hands."""
        device = self._arena.pages.device
        if device.type == "cuda":
            # An error of the device is on its way to the caller, and nothing runs after it.
            with suppress(RuntimeError):
                torch.cuda.synchronize(device)

    def _inputs_of(self, rows: tuple[Row, ...]) -> DeviceStep:
        if all(len(row.token_ids) == 1 and row.samples for row in rows):
            return self._inputs.decode(rows)
        return self._inputs.mixed(rows)

    def _run_rows(self, step_id: int, rows: tuple[Row, ...]) -> Drawn | None:
        self._inputs.page_tables.update(rows)
        slots = tuple(row.slot for row in rows if row.samples)
        prepared, self._prepared = self._prepared, None
        step = prepared[1] if prepared is not None and prepared[0] == step_id else self._inputs_of(rows)
        self._take_tokens(slots)
        hidden_TD = self._hidden(step)
        if hidden_TD is not None:
            self._peers.receive_hidden(hidden_TD)
        output = self._run_step(step, hidden_TD)
        if not self._shard.is_last:
            assert output is not None, "a stage before the last has a residual"
            # The next step overwrites it.
            self._peers.send_hidden(output.clone())
            return None
        if not slots or output is None:
            return None
        drawn = self._sampler.draw(output[: len(slots)], slots, last_token=self._inputs.last_token)
        if not self._shard.is_first:
            self._peers.send_tokens(drawn.tokens.int())
        return drawn

    def _run_step(self, step: DeviceStep, hidden_TD: torch.Tensor | None) -> torch.Tensor | None:
        if step.key is None:
            return self._decoder.run(step, hidden_TD)
        # Outside the graph, which knows no adapters.
        for arrival in step.arrivals:
            torch.cuda.current_stream().wait_event(arrival.event)
        body = partial(self._decoder.run_captured, replace(step, arrivals=()), hidden_TD)
        return self._graphs.run(step.key, body, partial(self._inputs.wider, step))

    def _hidden(self, step: DeviceStep) -> torch.Tensor | None:
        return None if self._hidden_TD is None else self._hidden_TD[: step.token_ids.shape[0]]

    def _take_tokens(self, slots: tuple[int, ...]) -> None:
        """On the first of several stages: the tokens that the last one drew as many steps ago as there are stages."""
        if not self._shard.is_first or self._shard.is_last:
            return
        if len(self._drawn_elsewhere) == self._shard.shape.pp:
            drawn_for = self._drawn_elsewhere.popleft()
            if drawn_for:
                last_token = self._inputs.last_token
                tokens_B = torch.empty(len(drawn_for), dtype=torch.int32, device=last_token.device)
                self._peers.receive_tokens(tokens_B)
                at_B = upload(np.array(drawn_for, dtype=np.int32), last_token.device)
                last_token.index_copy_(0, at_B.long(), tokens_B)
        self._drawn_elsewhere.append(slots)
