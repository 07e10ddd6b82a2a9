"""``loraplex bench serve`` as a person runs it: a platform of a random base behind HAProxy, and the engine alone."""

import json
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.deployments.served import LORAPLEX

pytestmark = pytest.mark.ray


def test_the_platform_and_its_engine_do_the_same_work(tmp_path: Path) -> None:
    sizes = ("--streams", "4", "--requests", "8", "--input", "16", "--output", "8", "--adapters", "3", "--rank", "4")
    machine = ("--threads", "1", "--num-pages", "200", "--starts", "1", "--rounds", "2", "--data-dir", str(tmp_path))
    command = [LORAPLEX, "bench", "serve", "--model", "random:tiny-llama", *sizes, *machine, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    one, other = result["rounds"]
    report = one["http"]["report"]
    assert result["summary"]["errors"] == {}
    assert (report["completed"], report["prompt_tokens"], report["output_tokens"]) == (8, 8 * 16, 8 * 8)
    assert (one["engine"]["prompt_tokens"], one["engine"]["output_tokens"]) == (8 * 16, 8 * 8)
    assert one["engine"]["adapters"]["hit_rate"] == 1.0
    assert sorted(target["requests"] for target in report["targets"]) == [2, 3, 3]
    assert len(list((tmp_path / "artifacts").rglob("*.safetensors"))) == 3
    ratio = report["output_tokens_per_s"] / one["engine"]["output_tokens_per_s"]
    second = other["http"]["report"]["output_tokens_per_s"] / other["engine"]["output_tokens_per_s"]
    assert result["summary"]["http_over_engine"] == pytest.approx((ratio + second) / 2)
    assert result["machine"]["num_pages"] == 200
    assert {"replica", "client"} <= set(one["http"]["cpu"])

    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]
    assert left == []
