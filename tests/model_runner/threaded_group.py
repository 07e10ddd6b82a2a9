"""A group of ranks that run the Triton kernels, in one process: for tests without several GPUs.

The ranks are threads that compute in turns, since the interpreter serves one at a time; their exchange is plain
addition.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from loraplex.core.adapter import AdapterManifest
from loraplex.core.ids import Digest
from loraplex.core.plan import Shape
from loraplex.core.step import StepPlan, StepResult
from loraplex.cost.stages import stage_layers
from loraplex.model_runner.arena import Arena
from loraplex.model_runner.build import load_model_spec, load_weights
from loraplex.model_runner.gpu.executor import GpuExecutor
from loraplex.model_runner.rank_executor import TokenSampler
from loraplex.model_runner.shard import Shard, plan_shards

from tests.model_runner.conftest import BASE, ArgmaxSampler, unpacked

_PATIENCE_S = 120.0


class Turns:
    """Of threads one runs; who waits for another lets the others run."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._mail: dict[tuple[object, ...], deque[torch.Tensor]] = {}

    def __enter__(self) -> None:
        self._condition.acquire()

    def __exit__(self, *_: object) -> None:
        self._condition.release()

    def put(self, tensor: torch.Tensor, *address: object) -> None:
        self._mail.setdefault(address, deque()).append(tensor)
        self._condition.notify_all()

    def take(self, *address: object) -> torch.Tensor:
        arrived = self._condition.wait_for(lambda: self._mail.get(address), timeout=_PATIENCE_S)
        assert arrived, f"nothing came for {address}"
        return self._mail[address].popleft()


class ThreadPeers:
    def __init__(self, shard: Shard, turns: Turns) -> None:
        self._shard = shard
        self._turns = turns
        self.rows = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for part in self._parts(x, "sum"):
            total += part
        return total

    def gather_logits(self, logits_BV: torch.Tensor, out_BV: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat(self._parts(logits_BV, "logits"), dim=1, out=out_BV)

    def receive_hidden(self, out_TD: torch.Tensor) -> None:
        out_TD.copy_(self._turns.take("hidden", self._shard.rank))

    def send_hidden(self, residual_TD: torch.Tensor) -> None:
        self._turns.put(residual_TD, "hidden", self._shard.rank + self._shard.shape.tp)

    def send_tokens(self, tokens_B: torch.Tensor) -> None:
        self._turns.put(tokens_B, "tokens", self._shard.tp_rank)

    def receive_tokens(self, out_B: torch.Tensor) -> None:
        out_B.copy_(self._turns.take("tokens", self._shard.rank))

    def _parts(self, own: torch.Tensor, what: str) -> list[torch.Tensor]:
        """Of all shards of the stage, in their order."""
        shard, tp = self._shard, self._shard.shape.tp
        for peer in range(tp):
            self._turns.put(own.clone(), what, shard.stage, shard.tp_rank, peer)
        return [self._turns.take(what, shard.stage, peer, shard.tp_rank) for peer in range(tp)]


class ThreadedGroup:
    """As an executor, for ``Driver``: all ranks do what it is told."""

    def __init__(
        self,
        directory: str,
        shape: Shape,
        sampler: TokenSampler,
        *,
        device: torch.device,
        num_pages: int,
        page_size: int,
        cuda_graphs: bool,
    ) -> None:
        spec = load_model_spec(directory, BASE)
        turns = self._turns = Turns()
        self.ranks: list[GpuExecutor] = []
        for shard in plan_shards(spec, shape, stage_layers(spec, shape.pp)):
            weights = load_weights(directory, shard, dtype=torch.float32, device=device)
            arena = Arena(shard.local, num_pages=num_pages, page_size=page_size, dtype=torch.float32, device=device)
            speaks = shard.is_last and shard.tp_rank == 0
            self.ranks.append(
                GpuExecutor(
                    shard,
                    unpacked(weights),
                    arena,
                    sampler if speaks else ArgmaxSampler(),
                    max_rows=8,
                    max_step_tokens=128,
                    cuda_graphs=cuda_graphs,
                    peers=ThreadPeers(shard, turns),
                )
            )
        self._manifests: dict[Digest, AdapterManifest] = {}
        self._speaker = (shape.pp - 1) * shape.tp
        self._threads = ThreadPoolExecutor(len(self.ranks))

    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        self._manifests[manifest.digest] = manifest
        self._all(lambda rank: rank.stage_adapter(manifest, path))

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        return max(rank.adapter_pages(manifest) for rank in self.ranks)

    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
        manifest = self._manifests[digest]
        self._all(lambda rank: rank.load_adapter(digest, pages[: rank.adapter_pages(manifest)]))

    def submit(self, plan: StepPlan) -> None:
        self._all(lambda rank: rank.submit(plan))

    def collect(self) -> StepResult:
        return self._all(lambda rank: rank.collect())[self._speaker]

    def _all(self, do: Callable[[GpuExecutor], Any]) -> list[Any]:
        def turn(rank: GpuExecutor) -> Any:
            with self._turns:
                return do(rank)

        return [
            future.result(timeout=2 * _PATIENCE_S) for future in [self._threads.submit(turn, r) for r in self.ranks]
        ]
