"""Captured CUDA graphs by key: a key that comes a second time is captured, from then on it replays.

What a graph returns is valid until the next one runs: they share one memory pool, and the stream orders them. Called by
the executor. Without a CUDA device every run is eager.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch


class GraphCache:
    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._enabled = enabled and device.type == "cuda"
        self._device = device
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._seen: set[Hashable] = set()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, body: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``body`` reads inputs at fixed addresses, allocates nothing that outlives it, and never synchronises."""
        captured = self._graphs.get(key)
        if captured is None and key in self._seen:
            self.capture(key, body)
            captured = self._graphs.get(key)
        if captured is None:
            self._seen.add(key)
            return body()
        graph, output = captured
        graph.replay()
        return output

    def capture(self, key: Hashable, body: Callable[[], torch.Tensor]) -> None:
        """``body`` has run before: it has compiled its kernels and made library handles, which a capture must not."""
        if not self._enabled:
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Not torch.cuda.graph: before it captures it waits for the device and gives all cached memory back, 0.1 s in
        # the middle of a step.
        with torch.cuda.stream(self._stream):
            # thread_local: other threads may allocate pinned memory meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = body()
            finally:
                graph.capture_end()
        self._graphs[key] = (graph, output)
