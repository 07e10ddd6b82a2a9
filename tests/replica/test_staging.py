import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import BadAdapter, LoraplexError, NotFound
from loraplex.core.ids import Digest
from loraplex.replica.staging import FILE_DAMAGED, AdapterStager
from loraplex.testing.fake_executor import FakeExecutor, fake_manifest

A, STRANGE, GONE, BROKEN, TORN = (Digest(c * 64) for c in "abcde")


class Source:
    def __init__(self) -> None:
        self.fetched: list[Digest] = []
        self.gate = threading.Event()
        self.gate.set()

    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        self.gate.wait(5)
        self.fetched.append(digest)
        if digest == GONE:
            raise NotFound("no such adapter")
        if digest == BROKEN:
            raise OSError("/secret/path: disk failed")
        yield fake_manifest(digest, base_model_id="other" if digest == STRANGE else "fake-base"), "/secret/path"


class Staging:
    def __init__(self) -> None:
        self.source = Source()
        self.executor = FakeExecutor(unstageable=[TORN])
        self.staged: list[tuple[Digest, int]] = []
        self.failed: dict[Digest, LoraplexError] = {}
        self.stager = AdapterStager(
            self.executor,
            self.source,
            num_threads=2,
            on_staged=lambda digest, pages: self.staged.append((digest, pages)),
            on_failed=self.failed.__setitem__,
        )


@pytest.fixture
def staging() -> Iterator[Staging]:
    staging = Staging()
    yield staging
    staging.stager.close()


def wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_an_adapter_is_fetched_once_until_it_is_dropped(staging: Staging) -> None:
    staging.source.gate.clear()
    for _ in range(3):
        staging.stager.request(A)
    staging.source.gate.set()
    wait(lambda: staging.staged == [(A, 1)])
    staging.stager.request(A)
    staging.stager.unstage(A)
    assert staging.executor.staged == frozenset()
    staging.stager.request(A)
    wait(lambda: len(staging.staged) == 2)
    assert staging.source.fetched == [A, A]


def test_failures_tell_the_tenant_no_more_than_they_should(staging: Staging) -> None:
    for digest in (STRANGE, GONE, BROKEN, TORN):
        staging.stager.request(digest)
    wait(lambda: len(staging.failed) == 4)
    told = {digest: (error.message, error.class_code) for digest, error in staging.failed.items()}
    assert told == {
        STRANGE: ("the adapter is of base other, this replica serves fake-base", BadAdapter.code),
        GONE: ("no such adapter", NotFound.code),
        BROKEN: ("the adapter could not be read", "generation_failed"),
        TORN: (FILE_DAMAGED, BadAdapter.code),
    }
    staging.stager.request(GONE)
    wait(lambda: staging.source.fetched.count(GONE) == 2)


def test_nothing_begins_after_the_end(staging: Staging) -> None:
    staging.stager.close()
    staging.stager.request(A)
    assert staging.source.fetched == []
