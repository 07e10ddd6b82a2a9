"""The artifact store (local and pyarrow.fs) and the node cache: nothing torn, nothing wrong, nothing forgotten."""

import errno
import hashlib
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
from loraplex.core.adapter import AdapterManifest
from loraplex.core.control import ArtifactInfo
from loraplex.core.errors import BadAdapter, BadConfig, NotFound, StorageFull, Unavailable
from loraplex.core.ids import BaseModelId, Digest
from loraplex.object_storage.retry import Retry
from loraplex.registry.cache import NodeCache
from loraplex.registry.config import RegistryConfig
from loraplex.registry.store import ArtifactStore, LocalStore, RemoteStore, open_store

RETRY = Retry(total_s=5.0)
A, B = (Digest(letter * 64) for letter in "ab")


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "local":
        return open_store(f"file://{tmp_path}/store", retry=RETRY)
    url = f"mem://{tmp_path}/store?x=1"
    return RemoteStore(pyarrow.fs.LocalFileSystem(), f"{tmp_path}/store", url=url, retry=RETRY)


def _source(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "staged"
    path.write_bytes(data)
    return path


def test_publish_read_remove(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(_source(tmp_path, b"0123456789"), A)
    assert store.read(A, 0, 4) == b"0123"
    assert store.read(A, 8, 4) == b"89"
    assert store.read(A, 10, 4) == store.read(A, 1000, 4) == b""
    with pytest.raises(NotFound):
        store.read(B, 0, 4)
    store.publish(_source(tmp_path, b"something else"), A)
    assert store.read(A, 0, 100) == b"0123456789"
    store.remove(A)
    store.remove(A)
    with pytest.raises(NotFound):
        store.read(A, 0, 4)


def test_collect_removes_what_nobody_references(store: ArtifactStore, tmp_path: Path) -> None:
    assert store.collect(()) == (0, 0)
    for digest in (A, B):
        store.publish(_source(tmp_path, b"data"), digest)
    for torn in (tmp_path / "store" / "tmp-1", tmp_path / "store" / "aa" / ".tmp-1"):
        torn.parent.mkdir(exist_ok=True)
        torn.write_bytes(b"torn")
    stranger = tmp_path / "store" / "README"
    stranger.write_text("not ours")
    assert store.collect({A}) == (2, 0)
    assert store.read(A, 0, 10) == b"data"
    with pytest.raises(NotFound):
        store.read(B, 0, 10)
    assert stranger.exists()


def test_collect_keeps_artifacts_that_a_new_database_does_not_know(store: ArtifactStore, tmp_path: Path) -> None:
    """A lost database comes back from its backup; what it refers to must not be gone by then."""
    for digest in (A, B):
        store.publish(_source(tmp_path, b"data"), digest)
    for torn in (tmp_path / "store" / "tmp-1", tmp_path / "store" / "aa" / ".tmp-1"):
        torn.parent.mkdir(exist_ok=True)
        torn.write_bytes(b"torn")
    assert store.collect(()) == (1, 2)
    assert [store.read(digest, 0, 10) for digest in (A, B)] == [b"data", b"data"]


def test_urls(tmp_path: Path) -> None:
    assert LocalStore(tmp_path).url(A) == f"{tmp_path}/aa/{A}.safetensors"
    remote = RemoteStore(pyarrow.fs.LocalFileSystem(), "bucket/x", url="s3://bucket/x?region=eu", retry=RETRY)
    assert remote.url(A) == f"s3://bucket/x/{A}.safetensors?region=eu"


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        store.publish(_source(tmp_path, b"data"), A)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    store.publish(_source(tmp_path, b"data"), A)


def test_a_store_that_fails_to_remove_is_unavailable(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    store.publish(tmp_path / "source", A)

    def broken(*_args: object, **_options: object) -> None:
        # As pyarrow words it.
        raise OSError(errno.EIO, f"Failed to delete '{tmp_path}'. Detail: Input/output error")

    monkeypatch.setattr(Path, "unlink", broken)
    if isinstance(store, RemoteStore):
        monkeypatch.setattr(store, "_filesystem", SimpleNamespace(get_file_info=broken))
    for call in (lambda: store.remove(A), lambda: store.collect({B})):
        with pytest.raises(Unavailable) as caught:
            call()
        assert caught.value.message == "cannot write the artifact store: Input/output error", "no path for tenants"


def test_another_filesystem_is_copied_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def across(_source: str, _target: str) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", across)
    store = LocalStore(tmp_path / "store")
    store.publish(_source(tmp_path, b"data"), A)
    assert store.read(A, 0, 10) == b"data"


def test_bad_urls(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="artifact_url"):
        open_store("nosuch://bucket/x", retry=RETRY)
    (tmp_path / "file").touch()
    with pytest.raises(BadConfig, match="cannot create"):
        open_store(str(tmp_path / "file" / "store"), retry=RETRY)


class Reader:
    """The controller's side of the cache: files in memory, calls counted."""

    def __init__(self, *, url: str = "/nowhere/on/this/node") -> None:
        self.files: dict[Digest, bytes] = {}
        self.url = url
        self.sent: dict[Digest, bytes] = {}
        self.calls = 0

    def add(self, letter: str, num_bytes: int = 1000) -> Digest:
        digest = Digest(letter * 64)
        self.files[digest] = self.sent[digest] = os.urandom(num_bytes)
        return digest

    def info(self, digest: Digest) -> ArtifactInfo:
        self.calls += 1
        if digest not in self.files:
            raise NotFound("no artifact")
        data = self.files[digest]
        manifest = AdapterManifest(digest=digest, base_model_id=BaseModelId("b"), blocks=(), num_bytes=len(data))
        return ArtifactInfo(manifest=manifest, url=self.url, content_sha256=hashlib.sha256(data).hexdigest())

    def read(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        self.calls += 1
        return self.sent[digest][offset : offset + max_bytes]


def _fetch(cache: NodeCache, digest: Digest) -> tuple[AdapterManifest, str]:
    """As one that reads nothing."""
    with cache.open(digest) as opened:
        return opened


def _names(directory: Path, suffix: str = ".safetensors") -> set[str]:
    """First letters of the cached digests."""
    return {path.name[0] for path in directory.glob(f"*{suffix}")}


def _cache(directory: Path, reader: Reader, **settings: float) -> NodeCache:
    config = RegistryConfig(piece_bytes=300, **settings)  # type: ignore[arg-type]
    return NodeCache(config, directory=directory, reader=reader)


def test_a_download_in_pieces_is_kept_for_later_processes(tmp_path: Path) -> None:
    reader = Reader()
    digest = reader.add("a")
    manifest, path = _fetch(_cache(tmp_path, reader), digest)
    assert Path(path).read_bytes() == reader.files[digest]
    assert manifest == reader.info(digest).manifest
    calls = reader.calls
    assert _fetch(_cache(tmp_path, reader), digest) == (manifest, path)
    assert reader.calls == calls


def test_the_stores_own_file_is_used_where_it_is(tmp_path: Path) -> None:
    own = tmp_path / "own"
    reader = Reader(url=str(own))
    digest = reader.add("a")
    own.write_bytes(reader.files[digest])
    cache = _cache(tmp_path / "cache", reader)
    assert _fetch(cache, digest)[1] == str(own)
    assert reader.calls == 1
    own.write_bytes(b"x" * 1000)
    assert _fetch(cache, digest)[1] != str(own), "a file of another content is not believed"


def test_a_url_is_read_directly(tmp_path: Path) -> None:
    object_file = tmp_path / "object"
    reader = Reader(url=object_file.as_uri())
    digest = reader.add("a")
    object_file.write_bytes(reader.files[digest])
    _, path = _fetch(_cache(tmp_path / "cache", reader), digest)
    assert Path(path).read_bytes() == reader.files[digest]
    assert reader.calls == 1
    object_file.unlink()
    (tmp_path / "cache" / Path(path).name).unlink()
    with pytest.raises(NotFound):
        _fetch(_cache(tmp_path / "cache", reader), digest)


@pytest.mark.parametrize("sent", [b"", b"short", b"x" * 1000, b"x" * 100_000])
def test_what_does_not_match_is_refused_and_not_kept(tmp_path: Path, sent: bytes) -> None:
    reader = Reader()
    digest = reader.add("a")
    reader.sent[digest] = sent
    cache = _cache(tmp_path, reader)
    with pytest.raises(BadAdapter, match="damaged"):
        _fetch(cache, digest)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    reader.sent[digest] = reader.files[digest]
    _fetch(cache, digest)


def test_a_damaged_cache_file_is_fetched_again(tmp_path: Path) -> None:
    reader = Reader()
    digest = reader.add("a")
    _, path = _fetch(_cache(tmp_path, reader), digest)
    Path(path).write_bytes(b"y" * 1000)
    _, again = _fetch(_cache(tmp_path, reader), digest)
    assert Path(again).read_bytes() == reader.files[digest]
    Path(path).with_suffix(".info").write_bytes(b"torn")
    assert _fetch(_cache(tmp_path, reader), digest)[1] == again


def test_unknown_adapters_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    cache = _cache(tmp_path, reader)
    with pytest.raises(NotFound):
        _fetch(cache, A)
    digest = reader.add("a")

    def full(*_names: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageFull):
        _fetch(cache, digest)
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    reader = Reader()
    cache = _cache(tmp_path, reader, cache_bytes=3000)
    first, second, third = (reader.add(letter) for letter in "abc")
    for digest in (first, second, third):
        _fetch(cache, digest)
        time.sleep(0.02)
    _fetch(cache, first)
    _fetch(cache, reader.add("d"))
    assert _names(tmp_path) == _names(tmp_path, ".info") == {"a", "c", "d"}


def test_what_is_read_stays_and_who_finds_no_room_waits_for_its_reader(tmp_path: Path) -> None:
    reader = Reader()
    cache, other_process = (_cache(tmp_path, reader, cache_bytes=2500, cache_wait_s=0.1) for _ in range(2))
    first, second, third = (reader.add(letter) for letter in "abc")
    with cache.open(first) as (_, path), other_process.open(second):
        with pytest.raises(StorageFull, match="2500 bytes"):
            _fetch(other_process, third)
        assert Path(path).read_bytes() == reader.files[first]
    patient = _cache(tmp_path, reader, cache_bytes=2500)
    reading = cache.open(first)
    reading.__enter__()
    with cache.open(second):
        thread = threading.Thread(target=_fetch, args=(patient, third))
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive()
        reading.__exit__(None, None, None)
        thread.join(5)
    assert _names(tmp_path) == {"b", "c"}, "the one that nobody read any more"


def test_an_adapter_larger_than_the_cache_is_refused_at_once(tmp_path: Path) -> None:
    reader = Reader()
    with pytest.raises(StorageFull):
        _fetch(_cache(tmp_path, reader, cache_bytes=999), reader.add("a"))


def test_a_damaged_file_makes_room_for_itself(tmp_path: Path) -> None:
    reader = Reader()
    digest = reader.add("a")
    _, path = _fetch(_cache(tmp_path, reader), digest)
    Path(path).write_bytes(b"y" * 1000)
    _fetch(_cache(tmp_path, reader, cache_bytes=1000, cache_wait_s=0.1), digest)
    assert Path(path).read_bytes() == reader.files[digest]


def test_many_threads_of_two_processes_in_a_small_cache(tmp_path: Path) -> None:
    """Everything that is staged is evicted by somebody and fetched again; nobody ever sees another's bytes or none, and
    the directory never holds more than it may."""
    reader = Reader()
    digests = [reader.add(letter) for letter in "abcdefgh"]
    caches = [_cache(tmp_path, reader, cache_bytes=4000) for _ in range(2)]
    failures: list[str] = []
    over: list[int] = []
    done = threading.Event()

    def stage(number: int) -> None:
        for turn in range(30):
            digest = digests[(turn * (number + 1) + number) % len(digests)]
            with caches[number % 2].open(digest) as (_, path):
                if Path(path).read_bytes() != reader.files[digest]:
                    failures.append(digest)

    def watch() -> None:
        while not done.is_set():
            with caches[0]._making_room():
                sizes = [path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".info"]
            over.extend(total for total in (sum(sizes),) if total > 4000)

    threads = [threading.Thread(target=stage, args=(number,)) for number in range(4)]
    watcher = threading.Thread(target=watch)
    for thread in (*threads, watcher):
        thread.start()
    for thread in threads:
        thread.join(60)
    done.set()
    watcher.join()
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert over == []
    assert len(_names(tmp_path)) <= 4 < len(digests)
    assert reader.calls > 6 * len(digests), "nothing was evicted and fetched again"


def test_another_process_does_not_evict_what_is_being_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    digest = reader.add("a")
    _, path = _fetch(_cache(tmp_path, reader), digest)
    os.utime(path, (0, os.stat(path).st_mtime))
    hashing, other = hashlib.file_digest, Reader()

    def while_another_makes_room(file: Any, name: str) -> Any:
        monkeypatch.setattr(hashlib, "file_digest", hashing)
        with pytest.raises(StorageFull):
            _fetch(_cache(tmp_path, other, cache_bytes=1500, cache_wait_s=0.01), other.add("b"))
        return hashing(file, name)

    monkeypatch.setattr(hashlib, "file_digest", while_another_makes_room)
    calls = reader.calls
    _, again = _fetch(_cache(tmp_path, reader), digest)
    assert Path(again).read_bytes() == reader.files[digest]
    assert reader.calls == calls


def test_abandoned_downloads_are_removed_and_those_under_way_are_not(tmp_path: Path) -> None:
    reader = Reader()
    digest = reader.add("a")
    abandoned = tmp_path / ".tmp-old"
    abandoned.touch()
    reading = reader.read

    def while_another_starts(digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        _cache(tmp_path, Reader())
        return reading(digest, offset=offset, max_bytes=max_bytes)

    reader.read = while_another_starts  # type: ignore[method-assign]
    _, path = _fetch(_cache(tmp_path, reader), digest)
    assert Path(path).read_bytes() == reader.files[digest]
    assert not abandoned.exists()


def test_many_threads_download_once(tmp_path: Path) -> None:
    reader = Reader()
    digest = reader.add("a")
    cache = _cache(tmp_path, reader)
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(_fetch(cache, digest)[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert reader.calls == 1 + 5, "one question, four pieces and the empty one"
