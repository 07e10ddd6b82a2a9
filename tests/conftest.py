"""Without CUDA devices tests that need them are skipped, and Triton kernels run in Triton's interpreter. Tests of the
control database run on both kinds of database. Tests that neither start processes which others could disturb nor
measure time are marked ``beside``: `make test` runs several of them at a time."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.database.postgres import PostgresServer
from tests.object_storage.s3 import S3Server

if not any(Path("/dev").glob("nvidia[0-9]*")):
    # Read when triton is imported, and when a kernel is defined: this file comes before both.
    os.environ["TRITON_INTERPRET"] = "1"


BESIDE = {
    *("bench", "cli", "config", "controller", "core", "cost", "database", "demo", "docs", "engine"),
    *("gateway", "helm", "kernels", "model_runner", "object_storage", "pages", "planner"),
    *("profiler", "registry", "simulator", "telemetry", "tenancy", "testing", "traces"),
}
"""Folders of such tests. What is in one of them and needs the machine for itself is marked ``alone``."""
COMPILED = ("bench/test_fleet", "cli/test_commands", "planner/", "simulator/")
"""Of these, those that compile the simulator, which is kept: together, so that it is compiled once."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        if file.partition("/")[0] in BESIDE and not any(
            map(item.get_closest_marker, ("alone", "ray", "gpu", "multigpu"))
        ):
            item.add_marker(pytest.mark.beside)
    marked = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("multigpu")]
    if not marked:
        return
    import torch  # heavy, and only such tests need it here

    devices = torch.cuda.device_count()
    for item in marked:
        needed = 2 if item.get_closest_marker("multigpu") else 1
        if devices < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {devices}"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file run one after the other in one process, and so share what its fixtures make."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "compiled" if file.removeprefix("tests/").startswith(COMPILED) else file

    return ByFile(config, log)


@pytest.fixture(scope="module", autouse=True)
def heap_of_its_own() -> Iterator[None]:
    """Collections of garbage look at what the module made alone: there are millions of objects of the modules before
    it, and some code under test collects before everything that it times."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server that the whole run shares: whoever kills it starts it again."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes an empty database and returns its URL. A test for which one kind will do says
    ``parametrize("new_database", ["sqlite"], indirect=True)``."""
    urls: list[str] = []
    server: PostgresServer | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None

    def make() -> str:
        urls.append(server.create_database() if server else f"sqlite:///{tmp_path}/deep/er/control{len(urls)}.db")
        return urls[-1]

    yield make
    for url in urls if server else ():
        server.drop_database(url)


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """Of an empty database."""
    return new_database()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A running server that the whole run shares: each test has paths of its own, and opens the gate that it shut."""
    server = S3Server()
    yield server
    server.remove()
