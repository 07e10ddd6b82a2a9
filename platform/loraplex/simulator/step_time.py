"""Seconds of a step of one replica on its group, compiled; shared by both simulators.

A step of a group with several pipeline stages is cut into equal micro-batches, as many as there are stages (or rows);
it takes as long as one of them from end to end, or as all of them at the pace of the slowest stage.
"""

from loraplex.cost.step_cost import step_seconds
from loraplex.simulator.compiled import compiled
from loraplex.simulator.types import FloatArray

_seconds = compiled(step_seconds)


@compiled
def step_time_s(
    latency: FloatArray,
    interval: FloatArray,
    num_stages: int,
    prefill_rows: float,
    prefill_tokens: float,
    prefill_pairs: float,
    decode_rows: float,
    kv_tokens: float,
    num_adapters: float,
    adapter_bytes: float,
    lora_tokens: float,
) -> float:
    """``latency`` and ``interval``: ``StepCoefficients.array``; the rest as in ``StepComposition``."""
    parts = min(float(num_stages), prefill_rows + decode_rows)
    if parts <= 1.0:
        return _seconds(
            latency,
            prefill_rows,
            prefill_tokens,
            prefill_pairs,
            decode_rows,
            kv_tokens,
            num_adapters,
            adapter_bytes,
            lora_tokens,
        )
    share = 1.0 / parts
    through = _seconds(
        latency,
        prefill_rows * share,
        prefill_tokens * share,
        prefill_pairs * share,
        decode_rows * share,
        kv_tokens * share,
        num_adapters * share,
        adapter_bytes * share,
        lora_tokens * share,
    )
    pace = _seconds(
        interval,
        prefill_rows * share,
        prefill_tokens * share,
        prefill_pairs * share,
        decode_rows * share,
        kv_tokens * share,
        num_adapters * share,
        adapter_bytes * share,
        lora_tokens * share,
    )
    return max(through, parts * pace)
