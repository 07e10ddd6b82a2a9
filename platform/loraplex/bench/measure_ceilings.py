"""Measures the ceilings of the device at hand: plain copies and matrix products, timed one at a time.

Knows nothing of engines. Called by ``session`` for devices that are not in the table of ``cost.ceilings``, and by
``kernels/benchmarks/ceilings.py`` with a model's shapes.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from loraplex.cost.ceilings import Ceilings

_PLAIN_SHAPES = ((1024, 1024),)


def measure_ceilings(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, int]] = _PLAIN_SHAPES,
    rows: Sequence[int] = (256,),
    copy_bytes: int | None = None,
) -> Ceilings:
    """``shapes``: (in, out) of weights that a product of each of ``rows`` (ascending) goes through in turn."""
    is_cuda = device.type == "cuda"
    if copy_bytes is None:
        # Past the caches.
        copy_bytes = (1024 if is_cuda else 64) << 20
    gemms = []
    for count in rows:
        flops = 2.0 * count * sum(num_in * num_out for num_in, num_out in shapes)
        gemms.append((count, flops / gemm_s(shapes, count, dtype, device)))
    return Ceilings(
        name=name,
        source=f"measured here, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}",
        measured=True,
        copy_bytes_per_s=2 * copy_bytes / copy_s(copy_bytes, device),
        gemm_flops_per_s=tuple(gemms),
        host_bytes_per_s=copy_bytes / host_copy_s(copy_bytes, device, to_device=True),
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if is_cuda else 0,
    )


def share_of_cpu(ceilings: Ceilings, num_ranks: int) -> Ceilings:
    """What is left of a CPU for each of ``num_ranks`` ranks that share it and exchange tensors through its memory."""
    if num_ranks == 1:
        return ceilings
    return replace(
        ceilings,
        source=f"{ceilings.source}; shared by {num_ranks} ranks",
        copy_bytes_per_s=ceilings.copy_bytes_per_s / num_ranks,
        gemm_flops_per_s=tuple((rows, flops / num_ranks) for rows, flops in ceilings.gemm_flops_per_s),
        host_bytes_per_s=ceilings.host_bytes_per_s / num_ranks,
        link_bytes_per_s=ceilings.copy_bytes_per_s / num_ranks,
    )


def copy_s(num_bytes: int, device: torch.device) -> float:
    """Seconds of a copy within the device's memory: reads and writes ``num_bytes`` each."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return median_s(lambda: target.copy_(source), device)


def host_copy_s(num_bytes: int, device: torch.device, *, to_device: bool) -> float:
    """Seconds of a copy between pinned host memory and the device."""
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    remote = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    source, target = (host, remote) if to_device else (remote, host)
    return median_s(lambda: target.copy_(source, non_blocking=True), device)


def gemm_s(shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one product of ``rows`` rows with each weight in turn, each weight with memory of its own. On CUDA as
    one graph, so that launches cost what they cost in an engine that uses graphs."""
    weights = [torch.randn(num_out, num_in, dtype=dtype, device=device) for num_in, num_out in shapes]
    inputs = {num_in: torch.randn(rows, num_in, dtype=dtype, device=device) for num_in, _ in shapes}
    outputs = [torch.empty(rows, weight.shape[0], dtype=dtype, device=device) for weight in weights]

    def products() -> None:
        for weight, output in zip(weights, outputs, strict=True):
            torch.mm(inputs[weight.shape[1]], weight.t(), out=output)

    with torch.inference_mode():
        if device.type != "cuda":
            return median_s(products, device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            products()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            products()
        return median_s(graph.replay, device)


def median_s(work: Callable[[], object], device: torch.device, *, repeats: int = 7) -> float:
    """Median seconds of ``work``, after one run that is not counted."""
    work()
    times: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return statistics.median(times)
