"""Which Loraplex a process runs: all processes of a platform run the same. Called by ``deploy``, on every node."""

import functools
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

_PACKAGES = ("loraplex", "loraplex_kernels", "loraplex_deployments")


@functools.cache
def build_id() -> str:
    """The version, and eight digits that depend on every source file as it was at the first call."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(folder)}\0".encode())
                digest.update(file.read_bytes())
    return f"{importlib.metadata.version('loraplex')}+{digest.hexdigest()[:8]}"
