"""``core.step.Executor`` on one device: owns arena, adapter tiers and sampler state, and runs steps.

Decides nothing: slots, pages and order come with the plan. Driven by the engine loop of a replica, from one thread;
``stage_adapter`` and ``unstage_adapter`` from any.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from loraplex_kernels import Llama3Scaling, rotary_frequencies

from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import ArenaSpec, RowStart, SampledToken, StepPlan, StepResult
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.batch import build_batch
from loraplex.model_runner.decoder import forward
from loraplex.model_runner.device_adapters import DeviceAdapters
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.families import family_by_name
from loraplex.model_runner.host_adapters import HostAdapters
from loraplex.model_runner.weights import DecoderWeights


class TokenSampler(Protocol):
    """Holds the sampling state of each open slot."""

    def start(self, start: RowStart) -> None: ...

    def release(self, slot: int) -> None: ...

    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        """``logits_BV``: (B, V) fp32 or bf16, one row a slot. Draws one token for each and remembers it; the tokens
        are on the device at once, and at ``last_token[slot]`` (int32) where that is given."""


class TorchExecutor:
    def __init__(
        self,
        model: ModelSpec,
        weights: DecoderWeights,
        arena: Arena,
        sampler: TokenSampler,
        *,
        max_rows: int,
        max_step_tokens: int,
    ) -> None:
        device = arena.pages.device
        self._model = model
        self._family = family_by_name(model.family, source=model.base_model_id)
        self._weights = weights
        self._arena = arena
        self._sampler = sampler
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._result: StepResult | None = None
        self._host = HostAdapters(model, page_bytes=arena.spec.page_bytes, dtype=arena.dtype, pin=device.type == "cuda")
        self._resident = DeviceAdapters(model, arena)
        scaling = model.rope_scaling
        self._frequencies = rotary_frequencies(
            model.head_dim,
            model.rope_theta,
            None
            if scaling is None
            else Llama3Scaling(
                factor=scaling.factor,
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
                original_max_positions=scaling.original_max_positions,
            ),
            device,
        )

    @property
    def model(self) -> ModelSpec:
        return self._model

    @property
    def arena(self) -> ArenaSpec:
        return self._arena.spec

    @property
    def max_in_flight(self) -> int:
        return 1

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        """Pages that the adapter takes. Pure. BadAdapter when it does not fit the base."""
        return self._host.layout(manifest).num_pages

    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        """Reads the safetensors file at ``path`` into the host tier. Any thread. BadAdapter."""
        self._host.stage(manifest, path)

    def stage_random_adapter(self, manifest: AdapterManifest, seed: int) -> None:
        """As ``stage_adapter`` with random weights: for benchmarks. Any thread. BadAdapter."""
        self._host.stage_random(manifest, seed)

    def unstage_adapter(self, digest: Digest) -> None:
        self._host.unstage(digest)

    def load_adapter(self, digest: Digest, pages: tuple[int, ...], *, after_step: int = 0) -> None:
        """Copies a staged adapter into ``pages``. Conflict when it is not staged, or loaded already.

        All steps before are done or precede the copy in the order of the device, so ``after_step`` changes nothing.
        """
        self._resident.load(digest, self._host.get(digest), pages)

    def drop_adapter(self, digest: Digest) -> None:
        self._resident.drop(digest)

    def submit(self, plan: StepPlan) -> None:
        """Releases, starts, rows; computes the whole step. Conflict when the step is too large, or one was not
        collected."""
        if self._result is not None:
            raise Conflict(f"step {self._result.step_id} was not collected")
        started_s = time.perf_counter()
        if len(plan.rows) > self._max_rows or plan.num_tokens > self._max_step_tokens:
            raise Conflict(
                f"step {plan.step_id} has {len(plan.rows)} rows and {plan.num_tokens} tokens; "
                f"at most {self._max_rows} and {self._max_step_tokens} are configured"
            )
        for slot in plan.releases:
            self._sampler.release(slot)
        for start in plan.starts:
            self._sampler.start(start)
        tokens: tuple[SampledToken, ...] = ()
        if plan.rows:
            with torch.inference_mode():
                tokens = self._run_rows(plan)
        self._result = StepResult(step_id=plan.step_id, tokens=tokens, duration_s=time.perf_counter() - started_s)

    def collect(self) -> StepResult:
        """The result of the step that was submitted. Conflict when there is none."""
        result, self._result = self._result, None
        if result is None:
            raise Conflict("no step is in flight")
        return result

    def close(self) -> None:
        """Frees weights and arena; the executor cannot be used afterwards. Idempotent."""
        for name in ("_weights", "_arena", "_resident", "_host"):
            if hasattr(self, name):
                delattr(self, name)

    def _run_rows(self, plan: StepPlan) -> tuple[SampledToken, ...]:
        kv = self._arena.kv
        batch = build_batch(
            plan.rows,
            self._model,
            kv.layout,
            sites=self._resident.sites,
            frequencies=self._frequencies,
            dtype=self._arena.dtype,
        )
        if batch.fresh_pages is not None:
            self._arena.clear(batch.fresh_pages)
        logits_BV = forward(self._model, self._family, self._weights, kv, batch)
        if logits_BV is None:
            return ()
        return tuple(self._sampler.draw(logits_BV, [row.slot for row in plan.rows if row.samples]).result())
