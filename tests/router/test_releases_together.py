"""Gateways of one release and replicas of the next, in processes with sources of their own, over the real link.

The next release is this one with a field more in everything that crosses the link.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import loraplex
import pytest

from tests.router.other_release import ask
from tests.router.replicas import start_replica

pytestmark = pytest.mark.beside

ROOT = Path(__file__).parents[2]
_CROSSES = ("wire", "request", "adapter")
_DATACLASS = re.compile(r"^@dataclass\(frozen=True, slots=True, kw_only=True\)\nclass \w+(?:\(\w+\))?:\n", re.MULTILINE)
_FIELD = "    of_the_future: tuple[str, ...] = ('x', 'y')\n"


@pytest.fixture(scope="module")
def next_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to import from."""
    folder = tmp_path_factory.mktemp("next")
    copied = shutil.copytree(loraplex.__path__[0], folder / "loraplex", ignore=shutil.ignore_patterns("__pycache__"))
    for module in _CROSSES:
        file = Path(copied) / "core" / f"{module}.py"
        text, num_changed = _DATACLASS.subn(lambda match: match[0] + _FIELD, file.read_text())
        assert num_changed
        file.write_text(text)
    return folder


@contextmanager
def other_process(folder: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.router.other_release", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_this_gateway_and_the_next_replica(next_release: Path, stack: AsyncExitStack) -> None:
    with other_process(next_release, "replica") as process:
        assert process.stdout is not None
        await ask(stack, int(process.stdout.readline()), gateway="this")


async def test_gateways_of_both_and_this_replica(next_release: Path, stack: AsyncExitStack) -> None:
    replica = await start_replica(stack, "replica-0")
    with other_process(next_release, "router", str(replica.port)) as process:
        for number in itertools.count():
            await ask(stack, replica.port, gateway=f"this-{number}")
            if process.poll() is not None:
                break
    assert process.returncode == 0
    assert replica.loop.num_unfinished == 0
