"""Starts processes that do not see certain directories: nodes of one machine whose files are their own.

Linux's mount namespaces, for which a process needs the rights of root. Called by ``local_cluster``.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_CLONE_NEWNS, _CLONE_FS = 0x20000, 0x200
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def hidden(directories: Iterable[Path], *, behind: Path) -> Iterator[bool]:
    """Within, this thread and the processes that it starts find what is in ``behind``, an empty directory, in place of
    each of ``directories``. False where this process may not bring that about: then all are seen."""
    with contextlib.ExitStack() as stack:
        home = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        if _libc.unshare(_CLONE_NEWNS) != 0:
            yield False
            return
        stack.callback(os.chdir, Path.cwd())
        stack.callback(_checked, _libc.setns, home, _CLONE_NEWNS)
        # Threads that were started within have the same root and directory; who shares these may not leave.
        stack.callback(_checked, _libc.unshare, _CLONE_FS)
        _mount(b"none", b"/", _MS_REC | _MS_PRIVATE)
        for directory in directories:
            _mount(bytes(behind), bytes(directory), _MS_BIND)
        yield True


def _mount(source: bytes, target: bytes, flags: int) -> None:
    _checked(_libc.mount, source, target, None, flags, None)


def _checked(call: "ctypes._NamedFuncPointer", *arguments: object) -> None:
    if call(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
