import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loraplex.bench.engine_bench import run_engine_bench
from loraplex.bench.options import EngineBenchOptions, EngineLoad, EngineSetup, module_names
from loraplex.bench.part_times import covered, host_waits, part_of
from loraplex.bench.random_adapters import Popularity, draw_adapters, random_manifests
from loraplex.bench.session import BenchSession
from loraplex.core.errors import BadConfig, ContextTooLong
from loraplex.core.ids import BaseModelId
from loraplex.cost.roofline import HIDDEN_PARTS, Part
from loraplex.model_runner import load_model_spec


def _setup(**settings: Any) -> EngineSetup:
    return EngineSetup(**({"model": "random:tiny-llama", "threads": 1, "num_pages": 400, "ceilings": None} | settings))


def test_counts_add_up() -> None:
    load = EngineLoad(requests=6, input_tokens=20, output_tokens=5, adapters=3, lora_ranks=(4,))
    bench = run_engine_bench(EngineBenchOptions(setup=_setup(max_running=4, max_step_tokens=32), load=load))
    result = bench.result
    assert result.output_tokens == 30
    assert result.prompt_tokens == 120
    assert result.output_tokens_per_s == pytest.approx(30 / result.duration_s)
    # 120 prompt tokens in steps of 32 at most, and four decoding steps after the last prompt is done.
    assert 8 <= result.steps <= 20
    assert result.tpot_s is not None
    assert 0 < result.ttft_s.p50 <= result.ttft_s.p99 <= result.e2e_s.p99 <= result.duration_s
    assert 0 < result.engine_share < 1
    assert bench.machine.ready_s is None or bench.machine.ready_s > 0
    assert result.adapters is not None
    assert result.adapters.pages > 0
    assert (result.adapters.loads, result.adapters.hit_rate) == (0, 1.0)
    json.loads(msgspec.json.encode(bench))


def test_eta_covers_every_token_of_the_run() -> None:
    load = EngineLoad(requests=6, input_tokens=20, output_tokens=5, adapters=2, lora_ranks=(8,))
    result = run_engine_bench(EngineBenchOptions(setup=_setup(max_step_tokens=256), load=load)).result
    eta = result.eta
    assert eta.decode is not None
    assert eta.prefill is not None
    # All prompts in one step; the last token of a request is not read back.
    assert (eta.prefill.steps, eta.prefill.tokens) == (1, 120)
    assert (eta.decode.steps, eta.decode.tokens) == (4, 6 * 4)
    measured_s = eta.decode.measured_s + eta.prefill.measured_s
    assert 0.5 * result.duration_s < measured_s <= result.duration_s
    assert eta.eta == pytest.approx((eta.decode.ideal_s + eta.prefill.ideal_s) / measured_s)
    assert 0 < eta.eta < 1
    for phase in (eta.decode, eta.prefill):
        assert sum(phase.ideal_shares.values()) == pytest.approx(1)
        assert set(phase.ideal_shares) == set(Part) - HIDDEN_PARTS - {Part.COLLECTIVES}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_group_of_ranks_runs_the_same_load(tp: int, pp: int) -> None:
    load = EngineLoad(requests=4, input_tokens=20, output_tokens=5, adapters=2, lora_ranks=(8,))
    bench = run_engine_bench(EngineBenchOptions(setup=_setup(tp=tp, pp=pp), load=load))
    assert bench.result.output_tokens == 20
    assert bench.result.adapters is not None
    assert (bench.machine.setup.tp, bench.machine.setup.pp) == (tp, pp)
    decode = bench.result.eta.decode
    assert decode is not None
    assert (Part.COLLECTIVES in decode.ideal_shares) == (tp > 1)
    assert "shared by 2 ranks" in bench.result.eta.ceilings_source


def test_eta_is_against_the_given_ceilings() -> None:
    load = EngineLoad(requests=2, input_tokens=8, output_tokens=3)
    report = run_engine_bench(EngineBenchOptions(setup=_setup(ceilings="h100-80gb"), load=load)).result.eta
    assert report.ceilings == "h100-80gb"
    assert report.eta < 0.01
    with pytest.raises(BadConfig, match="h100-80gb"):
        run_engine_bench(EngineBenchOptions(setup=_setup(ceilings="nosuch.json"), load=load))


def test_concurrency_bounds_what_runs() -> None:
    load = EngineLoad(requests=4, input_tokens=8, output_tokens=4, concurrency=1, warmup_requests=0)
    result = run_engine_bench(EngineBenchOptions(setup=_setup(model="random:tiny-qwen3"), load=load)).result
    # One at a time: each takes a prefill, which samples the first token, and three decoding steps.
    assert result.steps == 16


def test_cold_adapters_are_loaded_and_a_cap_keeps_them_moving() -> None:
    session = BenchSession(_setup())
    try:
        load = EngineLoad(
            requests=12, input_tokens=4, output_tokens=2, adapters=4, lora_ranks=(8,), concurrency=1, warmup_requests=2
        )
        loads = {}
        page_bytes = session.machine.page_bytes
        pages = session.executor.adapter_pages(session.stage(load)[0])
        for name, changes in {
            "resident": {},
            "cold": {"resident": False},
            "capped": {"adapter_bytes_cap": 3 * pages * page_bytes},
        }.items():
            traffic = session.run(msgspec.structs.replace(load, **changes)).adapters
            assert traffic is not None
            assert traffic.hit_rate == 1 - traffic.loads / 12
            loads[name] = traffic.loads
        # In turn, with room for three of four, the one that is asked for has always just been dropped.
        assert loads["resident"] == 0
        assert loads["cold"] == 4
        assert loads["capped"] >= 9
    finally:
        session.close()


def test_adapters_may_stand_by() -> None:
    session = BenchSession(_setup())
    try:
        load = EngineLoad(requests=4, input_tokens=8, output_tokens=3, adapters=3, popularity=Popularity.NONE)
        manifests = session.prepare(load)
        assert set(session.engine.resident_adapters()) == {manifest.digest for manifest in manifests}
        assert [request.adapter for request in session.requests(load, manifests)] == [None] * 4
        result = session.run(load)
        assert result.output_tokens == 12
        assert result.adapters is not None
        assert result.adapters.loads == 0
        assert set(session.engine.resident_adapters()) == {manifest.digest for manifest in manifests}
    finally:
        session.close()


def test_single_ttft_and_parts(tmp_path: Path) -> None:
    load = EngineLoad(requests=3, input_tokens=8, output_tokens=2, adapters=2, lora_ranks=(8, 16))
    trace = tmp_path / "new" / "decode.json.gz"
    bench = run_engine_bench(
        EngineBenchOptions(setup=_setup(), load=load, single_ttft=3, profile_steps=2, profile_trace=str(trace))
    )
    single = bench.single_ttft
    assert single is not None
    assert single.added_by_cold_s == single.cold_s.p50 - single.warm_s.p50
    assert 0 < single.base_s.p50 < 5
    assert bench.prefill_parts is not None
    assert bench.decode_parts is not None
    assert (bench.prefill_parts.steps, bench.decode_parts.steps) == (1, 2)
    for parts in (bench.prefill_parts, bench.decode_parts):
        assert 0 < parts.busy_s <= parts.wall_s
        assert sum(parts.shares.values()) == pytest.approx(1)
        assert parts.shares["gemm"] > 0
        assert parts.host_waits is None
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "loraplex: steps" in names


def test_profiled_decode_steps_hold_every_request() -> None:
    """Though the prefill takes longer than the first ones' share of decoding."""
    load = EngineLoad(requests=8, input_tokens=40, output_tokens=2, warmup_requests=0)
    setup = _setup(max_running=8, max_step_tokens=16)
    bench = run_engine_bench(EngineBenchOptions(setup=setup, load=load, profile_steps=3))
    assert bench.prefill_parts is not None
    assert bench.prefill_parts.steps >= 20
    assert bench.decode_parts is not None
    assert bench.decode_parts.steps == 3


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("lora_shrink_kernel", "lora"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "gemm"),
        ("linear_kernel", "gemm"),
        ("decode_kernel", "attention"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("add_rms_norm_kernel", "elementwise"),
        ("rotary_write_kv_kernel", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("aten::mm", "gemm"),
        ("something", "other"),
    ],
)
def test_parts_by_name(kernel: str, part: str) -> None:
    assert part_of(kernel) == part


def test_what_makes_the_host_wait() -> None:
    waits = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree"]
    waits += ["cuCtxSynchronize", "Memcpy DtoH (Device -> Pageable)"]
    others = ["cudaMemcpyAsync", "cudaStreamWaitEvent", "cudaGraphLaunch", "cuLaunchKernelEx", "cudaEventQuery"]
    others += ["cudaFreeAsync", "Memcpy DtoH (Device -> Pinned)", "aten::copy_", "cudaEventRecord"]
    assert host_waits([*waits, *others, "cudaEventSynchronize"], 2) == {
        name: (1.0 if name == "cudaEventSynchronize" else 0.5) for name in waits
    }


def test_overlapping_kernels_count_once() -> None:
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


def test_popularity() -> None:
    assert draw_adapters(5, 2, Popularity.ROUND_ROBIN) == [0, 1, 0, 1, 0]
    assert draw_adapters(2, 2, Popularity.NONE) == draw_adapters(2, 0, Popularity.UNIFORM) == [None, None]
    uniform = draw_adapters(4000, 4, Popularity.UNIFORM)
    zipf = draw_adapters(4000, 4, Popularity.ZIPF, zipf_exponent=1.5)
    assert all(850 < uniform.count(adapter) < 1150 for adapter in range(4))
    # 1, 1/2.83, 1/5.20, 1/8 of 1.671 in all.
    assert 2250 < zipf.count(0) < 2540
    assert 230 < zipf.count(3) < 370
    assert draw_adapters(50, 9, Popularity.ZIPF, seed=3) == draw_adapters(50, 9, Popularity.ZIPF, seed=3)


def test_manifests_take_their_ranks_in_turn() -> None:
    spec = load_model_spec("random:tiny-llama", BaseModelId("bench"))
    manifests = random_manifests(spec, count=5, lora_ranks=(8, 32), modules=module_names("v,q"))
    assert [manifest.max_lora_rank for manifest in manifests] == [8, 32, 8, 32, 8]
    assert [block.module for block in manifests[0].blocks] == ["q_proj", "v_proj"] * spec.num_layers
    assert len({manifest.digest for manifest in manifests}) == 5
    more = random_manifests(spec, count=7, lora_ranks=(8, 32), modules=("q_proj", "v_proj"))
    assert more[:5] == manifests


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ContextTooLong):
        run_engine_bench(
            EngineBenchOptions(setup=_setup(num_pages=16), load=EngineLoad(requests=1, input_tokens=100_000))
        )
    with pytest.raises(BadConfig, match="'x'"):
        module_names("q,x")
    with pytest.raises(BadConfig, match="steps to profile"):
        run_engine_bench(EngineBenchOptions(setup=_setup(), profile_trace="trace.json"))
    with pytest.raises(BadConfig, match="lm_head"):
        run_engine_bench(EngineBenchOptions(setup=_setup(), load=EngineLoad(modules=("lm_head",))))


def test_needs_no_server_and_no_command_line_packages() -> None:
    code = (
        "import sys, loraplex.bench.__main__\n"
        "bad = {'ray', 'fastapi', 'sqlalchemy', 'grpc', 'pyarrow', 'typer', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_runs_as_a_module() -> None:
    options = '{"setup": {"model": "random:tiny-llama", "threads": 1}, "load": {"requests": 2, "output_tokens": 2}}'
    command = [sys.executable, "-m", "loraplex.bench", "engine", options]
    bench = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert bench["result"]["output_tokens"] == 4
    assert subprocess.run([sys.executable, "-m", "loraplex.bench"], capture_output=True).returncode == 1
