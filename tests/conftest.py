"""Tests that need CUDA devices are skipped where there are none."""

import pytest


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
