"""The artifact store: checked safetensors files under their digest, on a local disk or behind ``pyarrow.fs``.

A file appears under its final name complete or not at all: temporary name, fsync, atomic rename (local), or upload
under a temporary key, then move (remote). So kill -9 leaves at most a temporary file, which ``collect`` removes. Knows
no tenant and no database; the controller says which digests are referenced. Blocking; called from worker threads.
"""

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.fs

from loraplex.core.errors import BadConfig, NotFound, StorageFull, Unavailable
from loraplex.core.ids import Digest
from loraplex.object_storage.location import open_location
from loraplex.object_storage.retry import Retry

logger = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_FILE_NAME = re.compile(r"([0-9a-f]{64})\.safetensors\Z")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Leftovers(NamedTuple):
    removed: int
    """Files."""
    kept: int
    """Artifacts that nothing refers to."""


class ArtifactStore(Protocol):
    def publish(self, source: Path, digest: Digest) -> None:
        """Stores the file at ``source`` (which may be moved away). No effect when the digest is stored already.

        Raises StorageFull, Unavailable.
        """

    def url(self, digest: Digest) -> str:
        """Absolute local path, or URL."""

    def read(self, digest: Digest, offset: int, max_bytes: int) -> bytes:
        """A piece; empty at the end. Raises NotFound, Unavailable."""

    def remove(self, digest: Digest) -> None:
        """Idempotent. Raises Unavailable."""

    def collect(self, referenced: Collection[Digest]) -> Leftovers:
        """Removes temporary files, and artifacts that are not referenced unless nothing is: a database that knows none
        beside a store that holds some is a new one, lost or not restored yet. Only while nothing publishes.

        Raises Unavailable.
        """


def open_store(url: str, *, retry: Retry) -> ArtifactStore:
    """``url``: a local path, file:// URL, or another URL that ``object_storage`` opens. Raises BadConfig, Unavailable.

    ``retry``: of a remote store's calls, but for ``remove``, which is repeated by who asks for it.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return LocalStore(Path(rest if separator else url))
    filesystem, path = open_location(url, param="registry.artifact_url")
    return RemoteStore(filesystem, path, url=url, retry=retry)


@contextmanager
def translated_disk_errors(what: str) -> Iterator[None]:
    """Raises StorageFull for a full disk or quota, Unavailable for any other OSError, instead of the OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(f"no space left for {what}") from error
        raise _unavailable(f"cannot write {what}", error) from error


def _unavailable(what: str, error: OSError) -> Unavailable:
    """Tenants read the message: the error's own text, which may name paths and hosts, goes to the log."""
    logger.warning("%s: %s", what, error)
    return Unavailable(f"{what}: {os.strerror(error.errno)}" if error.errno else what)


class LocalStore:
    """Files in ``root/ab/abcd....safetensors``: 256 folders, so that none grows large."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadConfig(
                f"cannot create the artifact store {self._root}: {error.strerror}", param="registry.artifact_url"
            ) from error

    def publish(self, source: Path, digest: Digest) -> None:
        target = self._path(digest)
        if target.exists():
            return
        temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
        with translated_disk_errors("the adapter"):
            target.parent.mkdir(exist_ok=True)
            try:
                _move(source, temporary)
                _fsync(temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _fsync(target.parent)
            _fsync(self._root)

    def url(self, digest: Digest) -> str:
        return str(self._path(digest))

    def read(self, digest: Digest, offset: int, max_bytes: int) -> bytes:
        try:
            with self._path(digest).open("rb") as file:
                file.seek(offset)
                return file.read(max_bytes)
        except FileNotFoundError:
            raise _gone(digest) from None
        except OSError as error:
            raise _unavailable(f"cannot read artifact {digest}", error) from error

    def remove(self, digest: Digest) -> None:
        with translated_disk_errors("the artifact store"):
            self._path(digest).unlink(missing_ok=True)

    def collect(self, referenced: Collection[Digest]) -> Leftovers:
        removed = kept = 0
        with translated_disk_errors("the artifact store"):
            for path in self._root.glob("[0-9a-f][0-9a-f]/*"):
                match = _FILE_NAME.match(path.name)
                if path.name.startswith(".tmp-") or (match is not None and _is_left_over(match[1], referenced)):
                    path.unlink(missing_ok=True)
                    removed += 1
                elif match is not None and match[1] not in referenced:
                    kept += 1
        return Leftovers(removed, kept)

    def _path(self, digest: Digest) -> Path:
        return self._root / digest[:2] / f"{digest}{_SUFFIX}"


class RemoteStore:
    """Objects ``root/abcd....safetensors`` of a ``pyarrow.fs.FileSystem``."""

    def __init__(self, filesystem: Any, root: str, *, url: str, retry: Retry) -> None:
        """``url``: what nodes prefix to a file name to open it; options after ``?`` stay behind the name."""
        self._filesystem = filesystem
        self._retry = retry
        self._root = root.rstrip("/")
        self._base_url, mark, options = url.partition("?")
        self._options = mark + options

    def publish(self, source: Path, digest: Digest) -> None:
        with translated_disk_errors("the adapter"):
            self._retry.call(lambda: self._publish(source, digest))

    def url(self, digest: Digest) -> str:
        return f"{self._base_url.rstrip('/')}/{digest}{_SUFFIX}{self._options}"

    def read(self, digest: Digest, offset: int, max_bytes: int) -> bytes:
        def attempt() -> bytes:
            with self._filesystem.open_input_file(self._path(digest)) as file:
                return bytes(file.read_at(max_bytes, min(offset, file.size())))

        try:
            return self._retry.call(attempt)
        except FileNotFoundError:
            raise _gone(digest) from None
        except OSError as error:
            raise _unavailable(f"cannot read artifact {digest}", error) from error

    def remove(self, digest: Digest) -> None:
        with translated_disk_errors("the artifact store"):
            if self._exists(digest):
                self._filesystem.delete_file(self._path(digest))

    def collect(self, referenced: Collection[Digest]) -> Leftovers:
        selector = pyarrow.fs.FileSelector(self._root, allow_not_found=True)
        removed = kept = 0
        with translated_disk_errors("the artifact store"):
            for info in self._retry.call(lambda: self._filesystem.get_file_info(selector)):
                match = _FILE_NAME.match(info.base_name)
                if info.base_name.startswith("tmp-") or (match is not None and _is_left_over(match[1], referenced)):
                    self._filesystem.delete_file(info.path)
                    removed += 1
                elif match is not None and match[1] not in referenced:
                    kept += 1
        return Leftovers(removed, kept)

    def _publish(self, source: Path, digest: Digest) -> None:
        """One attempt. What an earlier one left half done is done again, or collected at the next start."""
        if self._exists(digest):
            return
        self._filesystem.create_dir(self._root, recursive=True)
        temporary = f"{self._root}/tmp-{uuid.uuid4().hex}"
        with source.open("rb") as file, self._filesystem.open_output_stream(temporary) as stream:
            shutil.copyfileobj(file, stream, 4 * 1024 * 1024)
        arrived = self._filesystem.get_file_info(temporary).size
        if arrived != source.stat().st_size:
            raise OSError(errno.EIO, f"{arrived} bytes arrived in the place of {source.stat().st_size}")
        self._filesystem.move(temporary, self._path(digest))

    def _path(self, digest: Digest) -> str:
        return f"{self._root}/{digest}{_SUFFIX}"

    def _exists(self, digest: Digest) -> bool:
        return bool(self._filesystem.get_file_info(self._path(digest)).type == pyarrow.fs.FileType.File)


def _is_left_over(digest: str, referenced: Collection[Digest]) -> bool:
    return bool(referenced) and digest not in referenced


def _gone(digest: Digest) -> NotFound:
    return NotFound(f"artifact {digest} is not in the store")


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, target)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
