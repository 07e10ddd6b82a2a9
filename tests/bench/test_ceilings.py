import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from loraplex.bench.engine_bench import run_engine_bench
from loraplex.bench.measure_ceilings import gemm_s, measure_ceilings
from loraplex.bench.options import EngineBenchOptions, EngineLoad, EngineSetup
from loraplex.cost.ceilings import Ceilings

SCRIPT = Path(__file__).parent.parent.parent / "kernels/benchmarks/ceilings.py"


def test_the_script_prints_what_the_benchmark_reads(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--model", "tiny-llama", "--rows", "1,4", "--prefill-rows", "64", "--copy-mib", "1"]
    printed = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=True).stdout
    report = json.loads(printed)
    assert set(report["decode_gemms"]) == {"1", "4"}
    assert len(report["copy_bytes_per_s"]) == len(report["host_to_device_bytes_per_s"]) == 3
    ceilings = msgspec.convert(report["ceilings"], Ceilings)
    assert [rows for rows, _ in ceilings.gemm_flops_per_s] == [4, 64]

    # With a tenth of the speed that was measured the ideal takes ten times as long.
    setup = EngineSetup(model="random:tiny-llama", threads=1, num_pages=100)
    etas = []
    for factor in (1.0, 0.1):
        slower = {
            **report["ceilings"],
            "copy_bytes_per_s": 1e9 * factor,
            "gemm_flops_per_s": [[1, 1e12 * factor], [2, 1e12 * factor]],
        }
        file = tmp_path / "ceilings.json"
        file.write_text(json.dumps({**report, "ceilings": slower}))
        given = msgspec.structs.replace(setup, ceilings=str(file))
        load = EngineLoad(requests=2, input_tokens=8, output_tokens=3)
        etas.append(run_engine_bench(EngineBenchOptions(setup=given, load=load)).result.eta)
    first, second = (eta.decode for eta in etas)
    assert first is not None
    assert second is not None
    assert second.ideal_s == pytest.approx(10 * first.ideal_s)


@pytest.mark.alone
def test_measured_here() -> None:
    cpu = torch.device("cpu")
    ceilings = measure_ceilings("cpu", cpu, torch.float32, copy_bytes=1 << 22)
    assert ceilings.measured
    assert 1e8 < ceilings.copy_bytes_per_s < 1e13
    assert [rows for rows, _ in ceilings.gemm_flops_per_s] == [256]
    assert 1e8 < ceilings.gemm_flops_per_s[0][1] < 1e15


@pytest.mark.alone
def test_more_weights_take_longer() -> None:
    one = gemm_s([(256, 256)], 64, torch.float32, torch.device("cpu"))
    many = gemm_s([(256, 256), (256, 512)] * 40, 64, torch.float32, torch.device("cpu"))
    assert many > 5 * one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu() -> None:
    ceilings = measure_ceilings("gpu", torch.device("cuda"), torch.bfloat16, rows=(64, 4096))
    assert 1e11 < ceilings.copy_bytes_per_s < 2e13
    assert ceilings.gemm_flops_per_s[1][1] > ceilings.gemm_flops_per_s[0][1]
