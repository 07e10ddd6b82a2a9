"""Timing of GPU work as CUDA graphs, shared by the kernel benchmarks here; on the CPU it times plain calls."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch


def median_ms(step: Callable[[], None], *, repeats: int = 7, target_ms: float = 10.0) -> float:
    """Milliseconds of one ``step``: the median over ``repeats`` runs of enough replays."""
    return statistics.median(alternating_ms([step], repeats=repeats, target_ms=target_ms)[0])


def alternating_ms(
    steps: Sequence[Callable[[], None]], *, repeats: int = 7, target_ms: float = 10.0
) -> list[list[float]]:
    """Milliseconds of each of ``steps``, each captured once: ``repeats`` rounds in which all run one after another, so
    that the GPU's clock, which falls as it warms, is the same for those of a round."""
    if not torch.cuda.is_available():
        return [[_called_ms(step)] for step in steps]
    graphs = [_captured(step) for step in steps]
    counts = [max(1, min(100, int(target_ms / max(_replay_ms(graph, 1), 1e-3)))) for graph in graphs]
    rounds = [[_replay_ms(graph, count) for graph, count in zip(graphs, counts, strict=True)] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def _called_ms(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def _captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def compile_apart(build: Callable[[Any], None], jobs: Sequence[Any], processes: int) -> None:
    """Runs ``build(job)`` of all jobs in ``processes`` processes: Triton's cache on disk then holds their kernels."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(build, jobs))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
