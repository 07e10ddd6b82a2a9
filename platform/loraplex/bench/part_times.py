"""Shares the time of steps out by part, from the names of the kernels that torch's profiler saw, and counts where the
host waited for the device.

The profiler slows the host down, so the shares come from steps of their own and no other figure does. On the CPU the
names are those of operators, and all matrix products are one part. Called by ``engine_bench``.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from loraplex.bench.results import PartTimes

PARTS = (
    ("lora", r"lora"),
    ("attention", r"attention|flash|fmha|_sdpa|^(decode|combine|prefill)_kernel"),
    ("sampling", r"sampl|draw|argmax|softmax|sort|topk|cumsum|exponential"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|splitk|_mm$|::mm|addmm|matmul|::linear|^linear_kernel|mkldnn"),
    ("copies", r"memcpy|memset|copy_|host to device|::to$"),
    ("elementwise", r"norm|rotary|silu|embed|elementwise|::(add|mul|cat|index)|write_kv|vectorized|reduce"),
)
"""Part and the pattern of its kernels' names; the first that matches counts, the rest is ``other``."""

_WAITS = re.compile(r"cu(da)?(Stream|Device|Event|Ctx)Synchronize|cu(da)?(Memcpy|Free)(?!\w*Async)|Memcpy .*Pageable")
_STEPS = "loraplex: steps"

_PATTERNS = tuple((part, re.compile(pattern, re.IGNORECASE)) for part, pattern in PARTS)


def part_of(kernel: str) -> str:
    return next((part for part, pattern in _PATTERNS if pattern.search(kernel)), "other")


def host_waits(calls: Iterable[str], num_steps: int) -> dict[str, float]:
    """Those of ``calls`` (of the CUDA runtime and driver, and copies on the device) that make the host wait: name ->
    calls a step."""
    counts = Counter(call for call in calls if _WAITS.match(call))
    return {call: count / num_steps for call, count in sorted(counts.items())}


def measure_parts(steps: Callable[[], int], device: torch.device, *, trace: Path | None = None) -> PartTimes:
    """Runs ``steps``, which returns how many it ran, under the profiler. ``trace``: a file for their timeline, as
    Chrome and Perfetto read it; ``.json`` or ``.json.gz``."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if is_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        started_s = time.perf_counter()
        with record_function(_STEPS):
            num_steps = steps()
        if is_cuda:
            torch.cuda.synchronize(device)
        wall_s = time.perf_counter() - started_s
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    wanted = DeviceType.CUDA if is_cuda else DeviceType.CPU
    everything = list(profiler.events() or ())
    # The range is on the device's timeline, too.
    events = [event for event in everything if event.device_type == wanted and event.name != _STEPS]
    totals: dict[str, float] = {}
    for event in events:
        own_us = event.time_range.elapsed_us() if is_cuda else event.self_cpu_time_total
        part = part_of(event.name)
        totals[part] = totals.get(part, 0.0) + own_us
    whole = sum(totals.values()) or 1.0
    intervals = [(event.time_range.start, event.time_range.end) for event in events]
    waits = None
    if is_cuda:
        # The last synchronisation is ours.
        end = next(e.time_range.end for e in everything if e.name == _STEPS and e.device_type == DeviceType.CPU)
        waits = host_waits((event.name for event in everything if event.time_range.start < end), num_steps)
    return PartTimes(
        steps=num_steps,
        wall_s=wall_s,
        busy_s=covered(intervals) / 1e6,
        shares={part: us / whole for part, us in sorted(totals.items(), key=lambda item: -item[1])},
        host_waits=waits,
    )


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of ``intervals``: kernels of several streams overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        if last > end:
            total += last - max(first, end)
            end = last
    return total
