"""Prometheus' own checker of rules."""

import subprocess
from pathlib import Path

PROMTOOL = Path(__file__).parents[2] / ".tools" / "bin" / "promtool"


def promtool(*arguments: str | Path) -> str:
    """What it says; AssertionError when it finds something wrong, or is not there."""
    assert PROMTOOL.exists(), "promtool is missing: make tools"
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
