"""The folder of trace files: names, atomic writes, listing, deletion. Local directory or any pyarrow.fs URL.

Owns the naming scheme. A *part* (``part-<run>-<sequence>.parquet``) holds a few seconds of rows; a *trace*
(``trace-<run>-<first>-<last>.parquet``) replaces the parts of that run in [first, last], so that a reader who sees both
knows from the names alone which to skip. ``run`` starts with the wall clock in milliseconds, so names sort by time.
Called by writer and reader; knows nothing of what is in the files.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from loraplex.object_storage.location import open_location
from loraplex.object_storage.retry import Retry

_NAME = re.compile(r"^(?:part-(?P<run>\w+)-(?P<seq>\d+)|trace-(?P<trun>\w+)-(?P<first>\d+)-(?P<last>\d+))\.parquet$")
_TEMPORARY = re.compile(r"^\.tmp-(?P<run>\w+)-.*")
RETRY = Retry(total_s=15.0)
"""Of who reads; a writer has its own patience."""
_ATOMIC_PUT = frozenset({"s3", "gcs", "abfs"})
"""Object stores: an object appears whole or not at all, and renaming would copy it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """One file of the folder, as its name and size tell."""

    name: str
    run: str
    first: int
    last: int
    """Equal to ``first`` for a part."""
    num_bytes: int
    modified_s: float
    """Wall clock; 0 when the store does not say."""

    @property
    def is_part(self) -> bool:
        return self.name.startswith("part-")

    @property
    def sort_key(self) -> tuple[str, int]:
        """Oldest first: by run, then by position in it."""
        return (self.run, self.first)

    def replaces(self, other: "TraceFile") -> bool:
        """Whether every row of ``other`` is also in this file."""
        if self.name == other.name or self.run != other.run or self.is_part:
            return False
        return self.first <= other.first and other.last <= self.last


def part_name(run: str, sequence: int) -> str:
    return f"part-{run}-{sequence:08d}.parquet"


def trace_name(run: str, first: int, last: int) -> str:
    return f"trace-{run}-{first:08d}-{last:08d}.parquet"


def without_replaced(files: list[TraceFile]) -> tuple[list[TraceFile], list[TraceFile]]:
    """(files to read, oldest first; files whose rows are in one of those)."""
    gone: set[str] = set()
    widest: TraceFile | None = None
    # Those that may replace a file come before it; of them the one that reaches farthest tells.
    for file in sorted(files, key=lambda file: (file.run, file.first, -file.last, file.is_part)):
        if widest is not None and widest.replaces(file):
            gone.add(file.name)
        elif not file.is_part:
            widest = file
    present = [file for file in files if file.name not in gone]
    return sorted(present, key=lambda file: file.sort_key), [file for file in files if file.name in gone]


def resolve(url: str) -> tuple[pafs.FileSystem, str]:
    """(filesystem, path in it) of a URL or of a local path. Raises BadConfig for a URL that cannot be opened,
    Unavailable when that needs an object store which does not answer."""
    if "://" not in url:
        return pafs.LocalFileSystem(), str(Path(url).expanduser().absolute())
    return open_location(url, param="trace URL")


class TraceFolder:
    """Reads and changes the files of one folder. Methods raise OSError as the file system reports it."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self.filesystem = filesystem
        self.path = path.rstrip("/") or "/"
        self._local = filesystem.type_name == "local"

    @classmethod
    def open(cls, url: str) -> "TraceFolder":
        return cls(*resolve(url))

    def create(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def path_of(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def files(self) -> list[TraceFile]:
        """Every trace file, unordered. Other files are not ours and are left out."""
        return self.listing()[0]

    def listing(self) -> tuple[list[TraceFile], list[str]]:
        """(our trace files, names of all other files) as one pass over the folder saw them; both unordered.

        A pass is no snapshot: beside a writer it may miss a file made meanwhile and the ones that it replaced.
        """
        found: list[TraceFile] = []
        others: list[str] = []
        for info in self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True)):
            match = _NAME.match(info.base_name)
            if info.type != pafs.FileType.File:
                continue
            if match is None:
                others.append(info.base_name)
                continue
            first = int(match["seq"] or match["first"])
            found.append(
                TraceFile(
                    name=info.base_name,
                    run=match["run"] or match["trun"],
                    first=first,
                    last=int(match["last"]) if match["last"] else first,
                    num_bytes=info.size or 0,
                    modified_s=info.mtime.timestamp() if info.mtime is not None else 0.0,
                )
            )
        return found, others

    def write(self, name: str, run: str, data: pa.Buffer) -> None:
        """Makes the file appear with all of ``data`` or not at all, also across a power cut (local) or a crash."""
        final = self.path_of(name)
        if self.filesystem.type_name in _ATOMIC_PUT:
            with self.filesystem.open_output_stream(final) as stream:
                stream.write(data)
            return
        temporary = self.path_of(f".tmp-{run}-{name}")
        try:
            if self._local:
                _write_durably(temporary, data)
                os.rename(temporary, final)
                _sync_directory(self.path)
            else:
                with self.filesystem.open_output_stream(temporary) as stream:
                    stream.write(data)
                self.filesystem.move(temporary, final)
        except OSError:
            self._delete_quietly(temporary)
            raise

    def delete(self, name: str) -> None:
        """A file that is gone already is fine."""
        try:
            self.filesystem.delete_file(self.path_of(name))
        except FileNotFoundError:
            return

    def set_aside(self, name: str) -> None:
        """Renames a damaged file so that it is no trace file any more but can be looked at."""
        self.filesystem.move(self.path_of(name), self.path_of(f"damaged-{name}"))

    def delete_temporary(self, *, older_than_s: float) -> None:
        """Removes what writers left that were killed while writing. ``older_than_s``: wall clock."""
        for info in self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True)):
            modified_s = info.mtime.timestamp() if info.mtime is not None else 0.0
            if _TEMPORARY.match(info.base_name) and modified_s < older_than_s:
                self.delete(info.base_name)

    def _delete_quietly(self, path: str) -> None:
        """Best effort after a failed write: the first error is the one to report."""
        try:
            self.filesystem.delete_file(path)
        except OSError:
            return


def _write_durably(path: str, data: pa.Buffer) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data)
        while len(view):
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
