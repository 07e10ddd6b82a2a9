"""Which commit a result is of. Called by whoever writes results."""

import subprocess
from pathlib import Path


def source_commit() -> str | None:
    """Of the source tree; None where it is not in a repository."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
