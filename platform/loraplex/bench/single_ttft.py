"""Time to the first token of one request alone: base, adapter on the accelerator, adapter in host memory.

The three kinds take turns, so that whatever drifts hits all alike. Called by ``engine_bench``.
"""

import msgspec

from loraplex.bench.options import EngineLoad
from loraplex.bench.results import Percentiles, SingleTtft
from loraplex.bench.session import BenchSession
from loraplex.core.adapter import AdapterManifest


def measure_single_ttft(session: BenchSession, load: EngineLoad, repeats: int) -> SingleTtft:
    """``load`` says how long the prompts and what the adapters are like; its numbers of either do not matter here."""
    # The first is the warm one, one more warms up the code that loads, each other is cold exactly once.
    kind = msgspec.structs.replace(load, requests=1, adapters=repeats + 2, resident=False, warmup_requests=0)
    warm, first_cold, *colds = session.prepare(kind)
    times: dict[str, list[float]] = {"base": [], "warm": [], "cold": []}

    def ttft_s(adapter: AdapterManifest | None) -> float:
        request = session.request(adapter, input_tokens=load.input_tokens, output_tokens=1)
        (timing,), _ = session.drive([request])
        return timing.ttft_s

    for adapter in (None, warm, first_cold, warm, None):
        ttft_s(adapter)
    for cold in colds:
        for name, adapter in (("base", None), ("warm", warm), ("cold", cold)):
            times[name].append(ttft_s(adapter))
    base_s, warm_s, cold_s = (Percentiles.of(values) for values in times.values())
    return SingleTtft(
        input_tokens=load.input_tokens,
        base_s=base_s,
        warm_s=warm_s,
        cold_s=cold_s,
        added_by_cold_s=cold_s.p50 - warm_s.p50,
    )
