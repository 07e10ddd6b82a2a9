"""``make demo-replan``: recorded traffic becomes a plan, the plan changes the cluster, attainment rises."""

import json
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_whole_loop() -> None:
    begun_s = time.monotonic()
    demo = subprocess.run(
        [sys.executable, "-m", "loraplex_deployments.demo_replan"], capture_output=True, text=True, timeout=500
    )
    assert demo.returncode == 0, demo.stderr
    result = json.loads(demo.stdout)
    assert result["attainment_after"] > result["attainment_before"] + 0.1
    assert sorted(result["groups_after"]) != sorted(result["groups_before"])
    assert any("applied" in line and "predicted gain" in line for line in result["decisions"])
    # Without what compiles the simulator, which is kept for the next run, it takes half of that.
    assert time.monotonic() - begun_s < 300
