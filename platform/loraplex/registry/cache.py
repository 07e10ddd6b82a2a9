"""A node's disk cache of adapters, shared by its replicas: digest in, manifest and local path out.

What is not cached comes from the store's own file, when this node sees it, without a copy; else by download from the
store's URL or, in pieces, from the controller. A cached file is named after its digest, has its manifest beside it, and
is checked against the content hash before its first use in a process. All files together, downloads under way included,
never take more than ``cache_bytes``: who reads or writes one holds a lock on it, and the least recently used of the
others make room. Knows no tenant and no Ray. Thread-safe and blocking: a replica's staging threads call it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from loraplex.core.adapter import AdapterManifest
from loraplex.core.control import ArtifactInfo
from loraplex.core.errors import BadAdapter, BadConfig, NotFound, StorageFull, Unavailable
from loraplex.core.ids import Digest
from loraplex.object_storage.location import open_location
from loraplex.object_storage.retry import Retry, read_pieces
from loraplex.registry.config import RegistryConfig
from loraplex.registry.store import translated_disk_errors

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp-"
_ROOM_POLL_S = 0.02


class ArtifactReader(Protocol):
    """How a node asks the controller. Blocking; any thread. Raises NotFound, Unavailable."""

    def info(self, digest: Digest) -> ArtifactInfo: ...

    def read(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        """A piece of the file; empty at its end."""


class NodeCache:
    """Files ``<digest>.safetensors`` and ``<digest>.info`` in one directory; their access time, which we set, is the
    time of the last use and decides who leaves first. A lock on a file (flock, shared) keeps it from being evicted, by
    any process of the node; the lock on ``.lock`` is for those who make room."""

    def __init__(self, config: RegistryConfig, *, directory: Path, reader: ArtifactReader) -> None:
        self._config = config
        self._directory = directory.absolute()
        self._reader = reader
        self._retry = Retry(total_s=config.storage_retry_s)
        self._mutex = threading.Lock()
        self._fetching: dict[Digest, threading.Lock] = {}
        self._verified: set[tuple[str, int, int]] = set()
        with translated_disk_errors("the adapter cache"):
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._making_room():
                self._remove_abandoned()

    @contextlib.contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        """Manifest and path of the checked safetensors file, which is not evicted meanwhile.

        Raises NotFound, Unavailable, StorageFull (no room within ``cache_wait_s``), BadAdapter (what came is not what
        the digest names).
        """
        with self._mutex:
            lock = self._fetching.setdefault(digest, threading.Lock())
        with contextlib.ExitStack() as held:
            with lock:
                opened = self._cached(digest, held)
                if opened is None:
                    info = self._reader.info(digest)
                    if self._matches(Path(info.url), info):
                        opened = info.manifest, info.url
                    else:
                        opened = info.manifest, str(self._download(digest, info, held))
            yield opened

    def _cached(self, digest: Digest, held: contextlib.ExitStack) -> tuple[AdapterManifest, str] | None:
        path = self._path(digest)
        try:
            info = msgspec.msgpack.decode(self._info_path(digest).read_bytes(), type=ArtifactInfo)
            if not _lock_shared(path, held):
                return None
            self._touch(path)
        except (OSError, msgspec.DecodeError):
            return None
        if not self._matches(path, info):
            path.unlink(missing_ok=True)
            return None
        return info.manifest, str(path)

    def _matches(self, path: Path, info: ArtifactInfo) -> bool:
        """Hashes a file once per process and state of the file."""
        try:
            status = path.stat()
            if status.st_size != info.manifest.num_bytes:
                return False
            key = (str(path), status.st_ino, status.st_mtime_ns)
            if key in self._verified:
                return True
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.content_sha256:
                    return False
        except OSError:
            return False
        self._verified.add(key)
        return True

    def _download(self, digest: Digest, info: ArtifactInfo, held: contextlib.ExitStack) -> Path:
        path = self._path(digest)
        sha256 = hashlib.sha256()
        num_bytes = 0
        with translated_disk_errors("the adapter cache"):
            temporary = self._reserve(info.manifest.num_bytes, held)
            try:
                with temporary.open("r+b") as file:
                    for piece in self._pieces(digest, info):
                        num_bytes += len(piece)
                        if num_bytes > info.manifest.num_bytes:
                            break
                        sha256.update(piece)
                        file.write(piece)
                if num_bytes != info.manifest.num_bytes or sha256.hexdigest() != info.content_sha256:
                    raise BadAdapter(f"the stored file of adapter {digest} is damaged")
                self._info_path(digest).write_bytes(msgspec.msgpack.encode(info))
                # Locked: who counts the directory must see one of the two names.
                with self._making_room():
                    os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._touch(path)
            status = path.stat()
        self._verified.add((str(path), status.st_ino, status.st_mtime_ns))
        return path

    def _pieces(self, digest: Digest, info: ArtifactInfo) -> Iterator[bytes]:
        if "://" in info.url:
            yield from self._remote_pieces(info.url)
            return
        offset = 0
        while piece := self._reader.read(digest, offset=offset, max_bytes=self._config.piece_bytes):
            offset += len(piece)
            yield piece

    def _remote_pieces(self, url: str) -> Iterator[bytes]:
        try:
            filesystem, path = open_location(url, param="registry.artifact_url")
            yield from read_pieces(filesystem, path, self._config.piece_bytes, self._retry)
        except FileNotFoundError as error:
            raise NotFound("the file of the adapter is not in the artifact store: it was deleted") from error
        except (BadConfig, OSError) as error:
            logger.warning("the artifact store does not answer: %s", error)
            raise Unavailable("the artifact store does not answer") from error

    def _reserve(self, num_bytes: int, held: contextlib.ExitStack) -> Path:
        """A temporary file of that size: room that no other download can take while ``held`` is open. StorageFull."""
        deadline_s = time.monotonic() + self._config.cache_wait_s
        while num_bytes <= self._config.cache_bytes:
            with self._making_room():
                if self._make_room(num_bytes):
                    temporary = self._directory / f"{_TEMPORARY}{uuid.uuid4().hex}"
                    with temporary.open("xb") as file:
                        file.truncate(num_bytes)
                    # It keeps the lock when it gets its name.
                    _lock_shared(temporary, held)
                    return temporary
            if time.monotonic() > deadline_s:
                break
            time.sleep(_ROOM_POLL_S)
        raise StorageFull(
            f"the adapter of {num_bytes} bytes has no room in this node's adapter cache of "
            f"{self._config.cache_bytes} bytes"
        )

    @contextlib.contextmanager
    def _making_room(self) -> Iterator[None]:
        with (self._directory / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _remove_abandoned(self) -> None:
        """Downloads whose process died."""
        for path in self._directory.glob(f"{_TEMPORARY}*"):
            _remove_unless_used(path)

    def _make_room(self, num_bytes: int) -> bool:
        """Evicts by time of last use what nobody reads; False when that is not enough."""
        self._remove_abandoned()
        entries = []
        excess = num_bytes - self._config.cache_bytes
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".safetensors":
                    entries.append((status.st_atime_ns, status.st_size, path))
                    excess += status.st_size
                elif path.name.startswith(_TEMPORARY):
                    excess += status.st_size
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            if _remove_unless_used(path):
                path.with_suffix(".info").unlink(missing_ok=True)
                excess -= size
        return excess <= 0

    def _touch(self, path: Path) -> None:
        status = path.stat()
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))

    def _path(self, digest: Digest) -> Path:
        return self._directory / f"{digest}.safetensors"

    def _info_path(self, digest: Digest) -> Path:
        return self._directory / f"{digest}.info"


def _lock_shared(path: Path, held: contextlib.ExitStack) -> bool:
    """Keeps the file from being evicted until ``held`` closes; False when it was evicted just before. OSError."""
    file = held.enter_context(path.open("rb"))
    fcntl.flock(file, fcntl.LOCK_SH)
    # Evicted, and perhaps replaced, between the opening and the lock.
    return os.fstat(file.fileno()).st_ino == path.stat().st_ino


def _remove_unless_used(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
