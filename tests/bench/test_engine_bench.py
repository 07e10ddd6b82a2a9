import json
import subprocess
import sys

import msgspec
import pytest
from loraplex.bench.engine_bench import EngineBenchOptions, run_engine_bench
from loraplex.core.errors import ContextTooLong


def test_counts_add_up() -> None:
    result = run_engine_bench(
        EngineBenchOptions(
            model="random:tiny-llama",
            requests=6,
            input_tokens=20,
            output_tokens=5,
            adapters=3,
            rank=4,
            threads=1,
            num_pages=256,
            max_running=4,
            max_step_tokens=32,
        )
    )
    assert result.output_tokens == 30
    assert result.prompt_tokens == 120
    assert result.output_tokens_per_s == pytest.approx(30 / result.duration_s)
    assert result.adapter_pages > 0
    # 120 prompt tokens in steps of 32 at most, and four decoding steps after the last prompt is done.
    assert 8 <= result.steps <= 20
    assert result.tpot_s is not None
    assert 0 < result.ttft_s.p50 <= result.ttft_s.p99 <= result.e2e_s.p99 <= result.duration_s
    assert 0 < result.engine_share < 1
    json.loads(msgspec.json.encode(result))


def test_concurrency_bounds_what_runs() -> None:
    options = EngineBenchOptions(
        model="random:tiny-qwen3",
        requests=4,
        input_tokens=8,
        output_tokens=4,
        concurrency=1,
        threads=1,
        num_pages=64,
        warmup_requests=0,
    )
    result = run_engine_bench(options)
    # One at a time: each takes a prefill, which samples the first token, and three decoding steps.
    assert result.steps == 16


def test_too_long_a_request_is_named() -> None:
    with pytest.raises(ContextTooLong):
        run_engine_bench(EngineBenchOptions(model="random:tiny-llama", requests=1, input_tokens=100_000, num_pages=16))


def test_imports_no_server_parts() -> None:
    code = (
        "import sys, loraplex.bench.engine_bench\n"
        "bad = {'ray', 'fastapi', 'sqlalchemy', 'grpc', 'pyarrow'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
