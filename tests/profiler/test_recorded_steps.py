"""The compositions of recorded steps account for every token of a load, once."""

from loraplex.bench.options import EngineLoad, EngineSetup
from loraplex.bench.session import BenchSession
from loraplex.cost.memory import whole_adapter_bytes


def test_every_token_is_in_one_step() -> None:
    session = BenchSession(
        EngineSetup(model="random:tiny-llama", threads=1, num_pages=400, max_running=4, max_step_tokens=32)
    )
    load = EngineLoad(requests=6, adapters=2, lora_ranks=(8, 12), input_tokens=40, output_tokens=5, concurrency=3)
    manifests = session.prepare(load)
    requests = session.requests(load, manifests)
    requests.append(session.request(None, input_tokens=7, output_tokens=3))
    session.engine.clear()
    session.drive(requests, concurrency=3)
    steps = session.engine.composition(manifests)
    assert len(steps) == len(session.engine.step_seconds())
    lora_tokens, base_tokens = 6 * (40 + 4), 7 + 2
    assert (steps.prefill_tokens + steps.decode_rows).sum() == lora_tokens + base_tokens
    assert steps.lora_tokens.sum() == lora_tokens
    assert (steps.prefill_tokens + steps.decode_rows).max() <= 32
    small, large = (whole_adapter_bytes(session.executor.model, rank, itemsize=4) for rank in (8, 16))
    assert set(steps.adapter_bytes.tolist()) <= {0, small, large, small + large}
    assert steps.adapter_bytes.max() == small + large
    assert session.itemsize == 4
    session.close()
