"""What the executors of all devices share: the model, the arena, the host tier of adapters, the limits of a step."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import Conflict
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import ArenaSpec, RowStart, StepPlan, StepResult
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.drawn import Drawn
from loraplex.model_runner.host_adapters import HostAdapters
from loraplex.model_runner.shard import Shard


class TokenSampler(Protocol):
    """Holds the sampling state of each open slot."""

    def start(self, start: RowStart) -> None: ...

    def release(self, slot: int) -> None: ...

    def draw(self, logits_BV: torch.Tensor, slots: Sequence[int], *, last_token: torch.Tensor | None = None) -> Drawn:
        """``logits_BV``: (B, V) fp32 or bf16, one row a slot. Draws one token for each and remembers it; the tokens
        are on the device at once, and at ``last_token[slot]`` (int32) where that is given."""


class ExecutorBase(ABC):
    """A ``core.step.Executor`` but for what touches the device."""

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
        return self._shard.model

    @property
    def arena(self) -> ArenaSpec:
        return self._arena.spec

    @property
    @abstractmethod
    def max_in_flight(self) -> int: ...

    @abstractmethod
    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None: ...

    @abstractmethod
    def drop_adapter(self, digest: Digest) -> None: ...

    @abstractmethod
    def submit(self, plan: StepPlan) -> None: ...

    @abstractmethod
    def collect(self) -> StepResult: ...

    @abstractmethod
    def close(self) -> None: ...

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

    def _check_size(self, plan: StepPlan) -> None:
        if len(plan.rows) > self._max_rows or plan.num_tokens > self._max_step_tokens:
            raise Conflict(
                f"step {plan.step_id} has {len(plan.rows)} rows and {plan.num_tokens} tokens; "
                f"at most {self._max_rows} and {self._max_step_tokens} are configured"
            )
