"""What the executors of all devices share on one rank: the rank's part of the model, its arena, the host tier of
adapters, the limits of a step."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import ArenaSpec, RowStart, StepPlan
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.executor_base import ExecutorBase
from loraplex.model_runner.host_adapters import HostAdapters
from loraplex.model_runner.shard import Shard


class TokenSampler(Protocol):
    """Holds the sampling state of each open slot."""

    def start(self, start: RowStart) -> None: ...

    def release(self, slot: int) -> None: ...

    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        """``logits_BV``: (B, V) fp32 or bf16, one row a slot. Draws one token for each and remembers it; the tokens
        are on the device at once, and at ``last_token[slot]`` (int32) where that is given."""


class RankExecutor(ExecutorBase):
    """An executor but for what touches the device."""

    def __init__(
        self, shard: Shard, arena: Arena, sampler: TokenSampler, *, max_rows: int, max_step_tokens: int
    ) -> None:
        self._shard = shard
        self._arena = arena
        self._sampler = sampler
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._host = HostAdapters(
            shard, page_bytes=arena.spec.page_bytes, dtype=arena.dtype, pin=arena.pages.device.type == "cuda"
        )

    @property
    def model(self) -> ModelSpec:
        """All of it."""
        return self._shard.model

    @property
    def arena(self) -> ArenaSpec:
        return self._arena.spec

    @property
    def device(self) -> torch.device:
        return self._arena.pages.device

    @property
    def itemsize(self) -> int:
        return self._arena.dtype.itemsize

    @property
    def num_stages(self) -> int:
        """As one that drives it sees it: a step is done when it is."""
        return 1

    def check(self) -> None:
        """It runs in this process: nothing else can be gone."""

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        """Pages that this rank's part of the adapter takes. Pure. BadAdapter when it does not fit the base."""
        return self._host.layout(manifest).num_pages

    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        self._host.stage(manifest, path)

    def stage_random_adapter(self, manifest: AdapterManifest, seed: int) -> None:
        self._host.stage_random(manifest, seed)

    def unstage_adapter(self, digest: Digest) -> None:
        self._host.unstage(digest)

    def prepare(self, plan: StepPlan) -> None:
        """``submit`` computes: there is nothing that could come before."""

    @abstractmethod
    def ready(self) -> bool:
        """The oldest step in flight has ended: ``collect`` would not wait."""

    def _check_size(self, plan: StepPlan) -> None:
        check_step_size(plan, max_rows=self._max_rows, max_step_tokens=self._max_step_tokens)


def check_step_size(plan: StepPlan, *, max_rows: int, max_step_tokens: int) -> None:
    """Raises Conflict when the step is larger than what was made room for."""
    if len(plan.rows) > max_rows or plan.num_tokens > max_step_tokens:
        raise Conflict(
            f"step {plan.step_id} has {len(plan.rows)} rows and {plan.num_tokens} tokens; "
            f"at most {max_rows} and {max_step_tokens} are configured"
        )
