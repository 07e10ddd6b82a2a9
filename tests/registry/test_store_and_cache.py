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
from loraplex.registry.cache import NodeCache
from loraplex.registry.config import RegistryConfig
from loraplex.registry.store import ArtifactStore, LocalStore, RemoteStore, open_store

A, B = (Digest(letter * 64) for letter in "ab")


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "local":
        return open_store(f"file://{tmp_path}/store")
    return RemoteStore(pyarrow.fs.LocalFileSystem(), f"{tmp_path}/store", url=f"mem://{tmp_path}/store?x=1")


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
    assert store.collect(()) == 0
    for digest in (A, B):
        store.publish(_source(tmp_path, b"data"), digest)
    for torn in (tmp_path / "store" / "tmp-1", tmp_path / "store" / "aa" / ".tmp-1"):
        torn.parent.mkdir(exist_ok=True)
        torn.write_bytes(b"torn")
    stranger = tmp_path / "store" / "README"
    stranger.write_text("not ours")
    assert store.collect({A}) == 2
    assert store.read(A, 0, 10) == b"data"
    with pytest.raises(NotFound):
        store.read(B, 0, 10)
    assert stranger.exists()


def test_urls(tmp_path: Path) -> None:
    assert LocalStore(tmp_path).url(A) == f"{tmp_path}/aa/{A}.safetensors"
    remote = RemoteStore(pyarrow.fs.LocalFileSystem(), "bucket/x", url="s3://bucket/x?region=eu")
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
    for call in (lambda: store.remove(A), lambda: store.collect(())):
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
        open_store("nosuch://bucket/x")
    (tmp_path / "file").touch()
    with pytest.raises(BadConfig, match="cannot create"):
        open_store(str(tmp_path / "file" / "store"))


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


def _cache(directory: Path, reader: Reader, **settings: float) -> NodeCache:
    config = RegistryConfig(piece_bytes=300, **settings)  # type: ignore[arg-type]
    return NodeCache(config, directory=directory, reader=reader)


def test_a_download_in_pieces_is_kept_for_later_processes(tmp_path: Path) -> None:
    reader = Reader()
    digest = reader.add("a")
    manifest, path = _cache(tmp_path, reader).fetch(digest)
    assert Path(path).read_bytes() == reader.files[digest]
    assert manifest == reader.info(digest).manifest
    calls = reader.calls
    assert _cache(tmp_path, reader).fetch(digest) == (manifest, path)
    assert reader.calls == calls


def test_the_stores_own_file_is_used_where_it_is(tmp_path: Path) -> None:
    own = tmp_path / "own"
    reader = Reader(url=str(own))
    digest = reader.add("a")
    own.write_bytes(reader.files[digest])
    cache = _cache(tmp_path / "cache", reader)
    assert cache.fetch(digest)[1] == str(own)
    assert reader.calls == 1
    own.write_bytes(b"x" * 1000)
    assert cache.fetch(digest)[1] != str(own), "a file of another content is not believed"


def test_a_url_is_read_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(url="s3://bucket/a")
    digest = reader.add("a")
    (tmp_path / "object").write_bytes(reader.files[digest])
    local = pyarrow.fs.LocalFileSystem(), str(tmp_path / "object")
    monkeypatch.setattr(pyarrow.fs, "FileSystem", SimpleNamespace(from_uri=lambda _url: local))
    _, path = _cache(tmp_path / "cache", reader).fetch(digest)
    assert Path(path).read_bytes() == reader.files[digest]
    assert reader.calls == 1
    (tmp_path / "object").unlink()
    (tmp_path / "cache" / Path(path).name).unlink()
    with pytest.raises(NotFound):
        _cache(tmp_path / "cache", reader).fetch(digest)


@pytest.mark.parametrize("sent", [b"", b"short", b"x" * 1000, b"x" * 100_000])
def test_what_does_not_match_is_refused_and_not_kept(tmp_path: Path, sent: bytes) -> None:
    reader = Reader()
    digest = reader.add("a")
    reader.sent[digest] = sent
    cache = _cache(tmp_path, reader)
    with pytest.raises(BadAdapter, match="damaged"):
        cache.fetch(digest)
    assert list(tmp_path.iterdir()) == []
    reader.sent[digest] = reader.files[digest]
    cache.fetch(digest)


def test_a_damaged_cache_file_is_fetched_again(tmp_path: Path) -> None:
    reader = Reader()
    digest = reader.add("a")
    _, path = _cache(tmp_path, reader).fetch(digest)
    Path(path).write_bytes(b"y" * 1000)
    _, again = _cache(tmp_path, reader).fetch(digest)
    assert Path(again).read_bytes() == reader.files[digest]
    Path(path).with_suffix(".info").write_bytes(b"torn")
    assert _cache(tmp_path, reader).fetch(digest)[1] == again


def test_unknown_adapters_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    cache = _cache(tmp_path, reader)
    with pytest.raises(NotFound):
        cache.fetch(A)
    digest = reader.add("a")

    def full(*_names: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageFull):
        cache.fetch(digest)
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_least_recently_fetched_leave_first(tmp_path: Path) -> None:
    reader = Reader()
    cache = _cache(tmp_path, reader, cache_bytes=3000, cache_min_idle_s=0.05)
    first, second, third = (reader.add(letter) for letter in "abc")
    for digest in (first, second, third):
        cache.fetch(digest)
        time.sleep(0.02)
    cache.fetch(first)
    time.sleep(0.1)
    cache.fetch(reader.add("d"))
    assert {path.name[0] for path in tmp_path.glob("*.safetensors")} == {"a", "c", "d"}
    assert {path.name[0] for path in tmp_path.glob("*.info")} == {"a", "c", "d"}


def test_what_was_fetched_just_now_is_not_evicted(tmp_path: Path) -> None:
    reader = Reader()
    cache = _cache(tmp_path, reader, cache_bytes=1500)
    paths = [cache.fetch(reader.add(letter))[1] for letter in "abc"]
    assert all(Path(path).exists() for path in paths)


def test_another_process_does_not_evict_what_is_being_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    digest = reader.add("a")
    _, path = _cache(tmp_path, reader).fetch(digest)
    os.utime(path, (0, os.stat(path).st_mtime))
    hashing, other = hashlib.file_digest, Reader()

    def while_another_makes_room(file: Any, name: str) -> Any:
        monkeypatch.setattr(hashlib, "file_digest", hashing)
        _cache(tmp_path, other, cache_bytes=1).fetch(other.add("b"))
        return hashing(file, name)

    monkeypatch.setattr(hashlib, "file_digest", while_another_makes_room)
    calls = reader.calls
    _, again = _cache(tmp_path, reader).fetch(digest)
    assert Path(again).read_bytes() == reader.files[digest]
    assert reader.calls == calls


def test_temporary_files_of_the_past_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".tmp-old", tmp_path / ".tmp-new"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    _cache(tmp_path, Reader())
    assert not old.exists()
    assert new.exists()


def test_many_threads_download_once(tmp_path: Path) -> None:
    reader = Reader()
    digest = reader.add("a")
    cache = _cache(tmp_path, reader)
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(cache.fetch(digest)[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert reader.calls == 1 + 5, "one question, four pieces and the empty one"
