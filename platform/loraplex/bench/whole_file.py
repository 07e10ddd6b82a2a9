"""Result files that are whole at any time, however a run ends. Called by ``sweep`` and ``fleet``."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """In place of what was there. Makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
