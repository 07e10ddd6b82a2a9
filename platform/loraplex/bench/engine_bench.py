"""Engine and executor alone: how many tokens a second, how long to the first, how long between two, how near the ideal.

No Ray, no network, no text. Called by ``loraplex bench engine``, and without the command line's packages by
``python -m loraplex.bench engine '{"setup": {"model": "random:tiny-llama"}}'``.
"""

from pathlib import Path

import torch

from loraplex.bench.options import EngineBenchOptions, EngineLoad
from loraplex.bench.part_times import measure_parts
from loraplex.bench.results import EngineBenchResult, PartTimes
from loraplex.bench.session import BenchSession, Timing
from loraplex.bench.single_ttft import measure_single_ttft
from loraplex.core.ids import RequestId


def run_engine_bench(options: EngineBenchOptions) -> EngineBenchResult:
    """Builds the model, runs the load, returns the figures. Raises BadConfig, InvalidInput; LoraplexError
    itself when a request ends with an error."""
    options.check()
    session = BenchSession(options.setup)
    try:
        result = session.run(options.load)
        single = measure_single_ttft(session, options.load, options.single_ttft) if options.single_ttft else None
        prefill, decode = (None, None)
        if options.profile_steps:
            trace = None if options.profile_trace is None else Path(options.profile_trace)
            prefill, decode = measure_phases(session, options.load, options.profile_steps, trace=trace)
        return EngineBenchResult(
            options=options,
            machine=session.machine,
            result=result,
            single_ttft=single,
            prefill_parts=prefill,
            decode_parts=decode,
        )
    finally:
        session.close()


def measure_phases(
    session: BenchSession, load: EngineLoad, num_steps: int, *, trace: Path | None = None
) -> tuple[PartTimes, PartTimes]:
    """The load's prefill, all of it at once, and then ``num_steps`` decode steps: where the time of each goes.
    ``trace``: file for the timeline of the latter."""
    device = torch.device(session.setup.device)
    manifests = session.prepare(load)
    num_requests = min(load.requests, session.setup.max_running)
    # Who is prefilled first decodes until the last one is; all are to be there when the decode steps begin.
    per_step = max(1, session.setup.max_step_tokens - num_requests)
    output_tokens = num_steps + 4 + -(-num_requests * load.input_tokens // per_step)
    requests = session.requests(load, manifests, output_tokens=output_tokens)[:num_requests]
    timings: dict[RequestId, Timing] = {}
    session.submit(iter(requests), timings, len(requests))

    def prefill() -> int:
        count = 0
        while any(timing.num_tokens == 0 for timing in timings.values()):
            session.step(timings)
            count += 1
        return count

    def decode() -> int:
        for _ in range(num_steps):
            session.step(timings)
        return num_steps

    parts = measure_parts(prefill, device), measure_parts(decode, device, trace=trace)
    while session.engine.num_unfinished:
        session.step(timings)
    session.drive(())
    return parts
