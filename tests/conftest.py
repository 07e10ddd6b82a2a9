"""Without CUDA devices tests that need them are skipped, and Triton kernels run in Triton's interpreter."""

import os
from pathlib import Path

import pytest

if not any(Path("/dev").glob("nvidia[0-9]*")):
    # Read when triton is imported, and when a kernel is defined: this file comes before both.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("multigpu")]
    if not marked:
        return
    import torch  # heavy, and only such tests need it here

    devices = torch.cuda.device_count()
    for item in marked:
        needed = 2 if item.get_closest_marker("multigpu") else 1
        if devices < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {devices}"))
