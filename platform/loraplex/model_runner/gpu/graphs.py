"""Captured CUDA graphs by key: the first run of a key is eager and captures, later ones replay.

All graphs share one memory pool, so what one returns is valid until the next runs; the stream orders both. Called by
the executor. Without a CUDA device every run is eager.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch


class GraphCache:
    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._enabled = enabled and device.type == "cuda"
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return tuple(self._graphs)

    def run(self, key: Hashable, body: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``body`` reads inputs at fixed addresses, allocates nothing that outlives it, and never synchronises."""
        if not self._enabled:
            return body()
        captured = self._graphs.get(key)
        if captured is None:
            # This run's work; it also compiles kernels and makes library handles, which a capture must not.
            output = body()
            self._graphs[key] = self._capture(body)
            return output
        graph, output = captured
        graph.replay()
        return output

    def _capture(self, body: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = body()
        self._pool = graph.pool()
        return graph, output
