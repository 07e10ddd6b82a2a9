"""What the layout of the repository must keep, whatever else changes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", ["platform", "kernels", "deployments"])
def test_the_outer_folders_are_no_packages(folder: str) -> None:
    """``platform`` is a module of the standard library and ``kernels`` a package of Hugging Face's."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_lock_pins_all_but_torch() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    loose = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[^ @]+", line)]
    assert loose == ["torch>=2.11,<2.14"]
    assert not any("+cpu" in line or "/" in line for line in lines)


def test_the_demo_adapters_stay_small() -> None:
    files = list((ROOT / "platform/loraplex/demo/adapters").rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= 3_000_000
