"""Runs the real engine and executor over a grid of loads and keeps each step's composition and time.

One process, one loaded model, no Ray. Called by ``loraplex profile`` and by tests.
"""

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
import numpy as np
import torch

from loraplex.bench.options import EngineLoad, EngineSetup
from loraplex.bench.session import BenchSession
from loraplex.bench.single_ttft import measure_single_ttft
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.cost.analytic import assumed_loads
from loraplex.cost.ceilings import ceilings_of_device
from loraplex.cost.memory import DEFAULT_MEMORY_FRACTION, memory_model, whole_adapter_bytes
from loraplex.cost.profile import BaseProfile, GpuProfile
from loraplex.cost.samples import Samples
from loraplex.cost.step_cost import StepComposition
from loraplex.model_runner import ExecutorConfig
from loraplex.profiler.cases import Limits, ProfileCase, grid, held_out, lone_prompts
from loraplex.profiler.decoding import time_decoding
from loraplex.profiler.measurement import Measurement

_LORA_RANKS = (8, 16, 32, 64)
_COLD_LOADS = 7
_COLD_RANK = 16


class ProfileOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    setup: EngineSetup
    base: str
    """Name of the base in the profile."""
    gpu: str | None = None
    """Name of the device in the profile; None: that of a known GPU, or ``cpu``."""
    num_adapters: Annotated[int, msgspec.Meta(ge=0)] = 64
    """At most; as many as fit in half of the arena are used. Ranks 8, 16, 32 and 64 in turn."""
    max_request_tokens: Annotated[int, msgspec.Meta(ge=8)] | None = None
    """Of prompt and output together; None: the base's context."""
    budget_s: float | None = None
    """No case of the grid starts later than this after the model was loaded."""
    seed: int = 0


def measure(options: ProfileOptions, *, say: Callable[[str], None]) -> Measurement:
    """``say`` is told of each case. BadConfig when the options contradict, or nothing could be measured in time."""
    session = BenchSession(options.setup, graph_patience=ExecutorConfig().graph_patience)
    try:
        return _measure(session, options, say=say)
    finally:
        session.close()


def _measure(session: BenchSession, options: ProfileOptions, *, say: Callable[[str], None]) -> Measurement:
    started_s = time.monotonic()
    model = dataclasses.replace(session.executor.model, base_model_id=BaseModelId(options.base))
    limits = _limits(session, options)
    load_s = _cold_load_s(session)
    fitted: list[Samples] = []
    lone: list[Samples] = []
    judged: list[Samples] = []
    cases = _plan(limits, options.seed)
    if session.setup.pp > 1:
        # First, so that no budget leaves it out: of the others few have steps of long prompts that are alone.
        cases.insert(0, (False, lone_prompts(limits, seed=options.seed)))
    # What compiles or allocates at its first use does so here.
    _run(session, cases[0][1], options)
    for number, (judges, case) in enumerate(cases, start=1):
        if options.budget_s is not None and time.monotonic() - started_s > options.budget_s:
            say(f"the budget is spent: {len(cases) - number + 1} of {len(cases)} cases left out")
            break
        samples, alone = _run(session, case, options)
        (judged if judges else fitted).append(samples)
        if not judges:
            lone.append(alone)
        say(_line(number, len(cases), case, samples, judges=judges))
    if not fitted or not judged:
        raise BadConfig("the budget ended before a case of the grid and one to judge by had run", param="budget_s")
    gpu = _gpu(session, options, load_s)
    return Measurement(
        base=BaseProfile(model=model, itemsize=session.itemsize),
        gpu=gpu,
        shape=session.setup.shape,
        note=f"{session.machine.device_name}, torch {session.machine.torch_version}, {options.setup.model}",
        fitted=_joined(fitted),
        held_out=_joined(judged),
        lone=_joined(lone) if session.setup.pp > 1 else None,
        decoding=time_decoding(
            session,
            gpu=gpu.name,
            max_request_tokens=limits.max_request_tokens,
            num_adapters=limits.num_adapters,
        ),
    )


def _run(session: BenchSession, case: ProfileCase, options: ProfileOptions) -> tuple[Samples, Samples]:
    """The steps and their pace; and of them, or of others where a pipeline has a pace only while several steps are in
    it, those that were alone. With a fresh engine; the case's adapters are on the accelerator, and on a GPU the case
    ran once before, for what is compiled or allocated at its first use. Steps have the graphs that a replica's have."""
    load = EngineLoad(
        requests=case.concurrency,
        adapters=max(case.adapters) + 1,
        lora_ranks=_LORA_RANKS,
        warmup_requests=min(4, case.concurrency),
        input_tokens=max(case.input_tokens),
        output_tokens=max(case.output_tokens),
        concurrency=case.concurrency,
        seed=options.seed,
    )
    manifests = session.prepare(load)
    for _ in range(1 if options.setup.device == "cpu" else 2):
        requests = [
            session.request(
                manifests[adapter] if adapter >= 0 else None, input_tokens=tokens_in, output_tokens=tokens_out
            )
            for tokens_in, tokens_out, adapter in zip(case.input_tokens, case.output_tokens, case.adapters, strict=True)
        ]
        gc.collect()
        session.engine.clear()
        session.drive(requests, concurrency=case.concurrency)
    engine, steps = session.engine, session.engine.composition(manifests)
    paced = engine.overlapped() if session.setup.pp > 1 else np.ones(len(steps), dtype=bool)
    paced_samples, lone_samples = (
        Samples.of(steps.take(chosen), engine.step_seconds()[chosen]) for chosen in (paced, engine.lone())
    )
    return paced_samples, lone_samples


def _limits(session: BenchSession, options: ProfileOptions) -> Limits:
    arena, model = session.executor.arena, session.executor.model
    adapters = session.stage(EngineLoad(adapters=options.num_adapters, lora_ranks=_LORA_RANKS, seed=options.seed))
    pages, fitting = 0, 0
    for manifest in adapters:
        pages += session.executor.adapter_pages(manifest)
        if pages > arena.num_pages // 2:
            break
        fitting += 1
    # A quarter of what is left for the growth of the running and the pages that are not full.
    kv_tokens = (arena.num_pages - min(pages, arena.num_pages // 2)) * arena.page_size * 3 // 4
    return Limits(
        max_running=options.setup.max_running,
        max_request_tokens=min(options.max_request_tokens or model.max_context_tokens, model.max_context_tokens),
        max_kv_tokens=kv_tokens,
        num_adapters=fitting,
    )


def _cold_load_s(session: BenchSession) -> float:
    """What an adapter in host memory adds to the first token of a lone request."""
    load = EngineLoad(requests=1, input_tokens=8, output_tokens=1, adapters=1, lora_ranks=(_COLD_RANK,))
    return max(0.0, measure_single_ttft(session, load, _COLD_LOADS).added_by_cold_s)


def _gpu(session: BenchSession, options: ProfileOptions, load_s: float) -> GpuProfile:
    model, arena, ceilings = session.executor.model, session.executor.arena, session.ceilings
    device_name = session.machine.device_name
    known = ceilings_of_device(device_name)
    if options.setup.device.startswith("cuda"):
        memory_bytes = int(torch.cuda.get_device_properties(options.setup.device).total_memory)
    else:
        # The CPU's arena is what was asked for: as much memory as gives this arena.
        held = memory_model(model, session.setup.shape, gpu_bytes=0, itemsize=session.itemsize)
        memory_bytes = math.ceil(
            (arena.num_pages * arena.page_bytes + held.weight_bytes + held.activation_bytes) / DEFAULT_MEMORY_FRACTION
        )
    transfer_s = whole_adapter_bytes(model, _COLD_RANK, itemsize=session.itemsize) / ceilings.host_bytes_per_s
    return GpuProfile(
        name=options.gpu or (known.name if known is not None else options.setup.device.partition(":")[0]),
        memory_bytes=memory_bytes,
        loads=assumed_loads(ceilings.host_bytes_per_s, host_latency_s=max(0.0, load_s - transfer_s)),
        source="measured",
    )


def _plan(limits: Limits, seed: int) -> list[tuple[bool, ProfileCase]]:
    """(held out?, case). Every fifth of the grid, from the first, the second and so on: whatever a budget leaves covers
    the whole range. The held out lie among them, so that a device that slows down does so for both."""
    cases = grid(limits, seed=seed)
    spread = [case for start in range(5) for case in cases[start::5]]
    judges = held_out(limits, seed=seed + 1)
    plan: list[tuple[bool, ProfileCase]] = []
    for index, case in enumerate(judges):
        first, last = (len(spread) * i // len(judges) for i in (index, index + 1))
        plan += [(False, member) for member in spread[first:last]]
        plan.append((True, case))
    return plan


def _joined(samples: Sequence[Samples]) -> Samples:
    steps, seconds = zip(*(sample.arrays() for sample in samples), strict=True)
    return Samples.of(StepComposition.joined(steps), np.concatenate(seconds))


def _line(number: int, count: int, case: ProfileCase, samples: Samples, *, judges: bool) -> str:
    distinct = len(set(case.adapters) - {-1})
    return (
        f"{number}/{count}{' (held out)' if judges else ''}: {case.concurrency} at a time, prompts to "
        f"{max(case.input_tokens)}, {distinct} adapters: {len(samples.seconds)} steps in {sum(samples.seconds):.2f} s"
    )
