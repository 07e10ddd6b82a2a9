"""A node's disk cache of adapters, shared by its replicas: digest in, manifest and local path out.

What is not cached comes from the store's own file, when this node sees it, without a copy; else by download from the
store's URL or, in pieces, from the controller. A cached file is named after its digest, has its manifest beside it, and
is checked against the content hash before its first use in a process. Knows no tenant and no Ray.
Thread-safe and blocking: a replica's staging threads call it.
"""

import contextlib
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import pyarrow.fs

from loraplex.core.adapter import AdapterManifest
from loraplex.core.control import ArtifactInfo
from loraplex.core.errors import BadAdapter, NotFound, Unavailable
from loraplex.core.ids import Digest
from loraplex.registry.config import RegistryConfig
from loraplex.registry.store import translated_disk_errors

_TEMPORARY = ".tmp-"
_TEMPORARY_AGE_S = 3600.0


class ArtifactReader(Protocol):
    """How a node asks the controller. Blocking; any thread. Raises NotFound, Unavailable."""

    def info(self, digest: Digest) -> ArtifactInfo: ...

    def read(self, digest: Digest, *, offset: int, max_bytes: int) -> bytes:
        """A piece of the file; empty at its end."""


class NodeCache:
    """Files ``<digest>.safetensors`` and ``<digest>.info`` in one directory; their access time, which we set, is the
    time of the last fetch and decides who leaves first."""

    def __init__(self, config: RegistryConfig, *, directory: Path, reader: ArtifactReader) -> None:
        self._config = config
        self._directory = directory.absolute()
        self._reader = reader
        self._mutex = threading.Lock()
        self._fetching: dict[Digest, threading.Lock] = {}
        self._verified: set[tuple[str, int, int]] = set()
        with translated_disk_errors("the adapter cache"):
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in self._directory.glob(f"{_TEMPORARY}*"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _TEMPORARY_AGE_S:
                        path.unlink()

    def fetch(self, digest: Digest) -> tuple[AdapterManifest, str]:
        """Manifest and path of the checked safetensors file. The file stays for at least ``cache_min_idle_s``.

        Raises NotFound, Unavailable, StorageFull, BadAdapter (what came is not what the digest names).
        """
        with self._mutex:
            lock = self._fetching.setdefault(digest, threading.Lock())
        with lock:
            cached = self._cached(digest)
            if cached is not None:
                return cached
            info = self._reader.info(digest)
            if self._matches(Path(info.url), info):
                return info.manifest, info.url
            return info.manifest, str(self._download(digest, info))

    def _cached(self, digest: Digest) -> tuple[AdapterManifest, str] | None:
        path = self._path(digest)
        try:
            info = msgspec.msgpack.decode(self._info_path(digest).read_bytes(), type=ArtifactInfo)
            # First, so that no other process evicts the file while this one hashes it.
            self._touch(path)
        except (OSError, msgspec.DecodeError):
            return None
        if not self._matches(path, info):
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

    def _download(self, digest: Digest, info: ArtifactInfo) -> Path:
        self._make_room(info.manifest.num_bytes)
        path, temporary = self._path(digest), self._directory / f"{_TEMPORARY}{uuid.uuid4().hex}"
        sha256 = hashlib.sha256()
        num_bytes = 0
        with translated_disk_errors("the adapter cache"):
            try:
                with temporary.open("wb") as file:
                    for piece in self._pieces(digest, info):
                        num_bytes += len(piece)
                        if num_bytes > info.manifest.num_bytes:
                            break
                        sha256.update(piece)
                        file.write(piece)
                if num_bytes != info.manifest.num_bytes or sha256.hexdigest() != info.content_sha256:
                    raise BadAdapter(f"the stored file of adapter {digest} is damaged")
                self._info_path(digest).write_bytes(msgspec.msgpack.encode(info))
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
            filesystem, path = pyarrow.fs.FileSystem.from_uri(url)
            with filesystem.open_input_stream(path) as stream:
                while piece := stream.read(self._config.piece_bytes):
                    yield bytes(piece)
        except FileNotFoundError as error:
            raise NotFound("the file of the adapter is not in the artifact store: it was deleted") from error
        except (OSError, ValueError) as error:
            raise Unavailable("the artifact store does not answer") from error

    def _make_room(self, num_bytes: int) -> None:
        """Evicts by time of last fetch. Adapters in use just now stay, even if the cache grows past its size then."""
        entries = []
        for path in self._directory.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_atime, status.st_size, path))
        excess = sum(size for _, size, _ in entries) + num_bytes - self._config.cache_bytes
        idle_before_s = time.time() - self._config.cache_min_idle_s
        for fetched_s, size, path in sorted(entries):
            if excess <= 0 or fetched_s > idle_before_s:
                break
            path.unlink(missing_ok=True)
            path.with_suffix(".info").unlink(missing_ok=True)
            excess -= size

    def _touch(self, path: Path) -> None:
        status = path.stat()
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))

    def _path(self, digest: Digest) -> Path:
        return self._directory / f"{digest}.safetensors"

    def _info_path(self, digest: Digest) -> Path:
        return self._directory / f"{digest}.info"
