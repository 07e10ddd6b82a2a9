"""Captured CUDA graphs by key. A step whose own graph is not there replays a wider one; where there is none it runs
eagerly, and is captured when it comes again.

What a graph returns is valid until the next one runs: they share one memory pool, and the stream orders them. Called by
the executor. Without a CUDA device every run is eager.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch


class GraphCache:
    def __init__(self, device: torch.device, *, enabled: bool, patience: int = 0) -> None:
        """``patience``: times that a wider graph serves a step before it gets its own."""
        self._enabled = enabled and device.type == "cuda"
        self._device = device
        self._patience = patience
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._ran: set[Hashable] = set()
        """Eagerly."""
        self._missed: Counter[Hashable] = Counter()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def run(
        self, key: Hashable, body: Callable[[], torch.Tensor], wider: Callable[[], Iterable[Hashable]] = tuple
    ) -> torch.Tensor:
        """``body`` reads inputs at fixed addresses, allocates nothing that outlives it, and never synchronises.
        ``wider``: keys whose graphs do the same with the same inputs, and more for nothing; the closest first."""
        captured = self._graphs.get(key)
        if captured is None and self._enabled:
            self._missed[key] += 1
            if self._missed[key] <= self._patience:
                captured = next((self._graphs[other] for other in wider() if other in self._graphs), None)
            if captured is None and key in self._ran:
                self.capture(key, body)
                captured = self._graphs[key]
        if captured is None:
            self._ran.add(key)
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
