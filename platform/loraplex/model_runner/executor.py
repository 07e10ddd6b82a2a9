"""``core.step.Executor`` in plain torch, for the CPU: owns arena, adapter tiers and sampler state, and runs steps.

Decides nothing: slots, pages and order come with the plan. A rank of a group runs its part of each step and exchanges
tensors with its peers; all shards of the last stage draw the same tokens, so that each has them for its next step. A
rank alone is driven by the engine loop of a replica, one of several by ``ranks.worker``: from one thread;
``stage_adapter`` and ``unstage_adapter`` from any.
"""

import time

import torch

from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.step import SampledToken, StepPlan, StepResult
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.batch import build_batch
from loraplex.model_runner.decoder import forward
from loraplex.model_runner.device_adapters import DeviceAdapters
from loraplex.model_runner.families import family_by_name
from loraplex.model_runner.frequencies import model_frequencies
from loraplex.model_runner.peers import Alone, Peers
from loraplex.model_runner.rank_executor import RankExecutor, TokenSampler
from loraplex.model_runner.shard import Shard
from loraplex.model_runner.weights import DecoderWeights


class TorchExecutor(RankExecutor):
    def __init__(
        self,
        shard: Shard,
        weights: DecoderWeights,
        arena: Arena,
        sampler: TokenSampler,
        *,
        max_rows: int,
        max_step_tokens: int,
        peers: Peers | None = None,
    ) -> None:
        """``weights`` and ``arena`` are those of ``shard``. ``peers``: the other ranks, None where there are none."""
        super().__init__(shard, arena, sampler, max_rows=max_rows, max_step_tokens=max_step_tokens)
        model = shard.local
        self._family = family_by_name(model.family, source=model.base_model_id)
        self._weights = weights
        self._peers = peers or Alone()
        self._result: StepResult | None = None
        self._resident = DeviceAdapters(model, arena)
        self._frequencies = model_frequencies(model, arena.pages.device)

    @property
    def max_in_flight(self) -> int:
        return 1

    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
        """Copies a staged adapter into ``pages``. Conflict when it is not staged, or loaded already."""
        with self._host.lend(digest) as staged:
            self._resident.load(digest, staged, pages)

    def drop_adapter(self, digest: Digest) -> None:
        self._resident.drop(digest)

    def submit(self, plan: StepPlan) -> None:
        """Releases, starts, rows; computes the whole step. Conflict when the step is too large, or one was not
        collected."""
        if self._result is not None:
            raise Conflict(f"step {self._result.step_id} was not collected")
        started_s = time.perf_counter()
        self._check_size(plan)
        if self._shard.is_last:
            for slot in plan.releases:
                self._sampler.release(slot)
            for start in plan.starts:
                self._sampler.start(start)
        tokens: tuple[SampledToken, ...] = ()
        if plan.rows:
            with torch.inference_mode():
                tokens = self._run_rows(plan)
        self._result = StepResult(step_id=plan.step_id, tokens=tokens, duration_s=time.perf_counter() - started_s)

    def ready(self) -> bool:
        return self._result is not None

    def collect(self) -> StepResult:
        """The result of the step that was submitted. Conflict when there is none."""
        result, self._result = self._result, None
        if result is None:
            raise Conflict("no step is in flight")
        return result

    def close(self) -> None:
        """Frees weights and arena; the executor cannot be used afterwards. Idempotent."""
        self._host.close()
        for name in ("_weights", "_arena", "_resident"):
            if hasattr(self, name):
                delattr(self, name)

    def _run_rows(self, plan: StepPlan) -> tuple[SampledToken, ...]:
        kv = self._arena.kv
        batch = build_batch(
            plan.rows,
            self._shard.local,
            kv.layout,
            sites=self._resident.sites,
            frequencies=self._frequencies,
            dtype=self._arena.dtype,
        )
        if batch.fresh_pages is not None:
            self._arena.clear(batch.fresh_pages)
        logits_BV = forward(self._shard.local, self._family, self._weights, kv, batch, self._peers)
        if logits_BV is None:
            return ()
        return tuple(self._sampler.draw(logits_BV, [row.slot for row in plan.rows if row.samples]).result())
