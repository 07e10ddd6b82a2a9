"""How functions are compiled: to machine code, without the GIL, kept on disk where it is called from Python.

numba looks for changes only in the file of the cached function itself, though the functions that it calls are part of
its code; so our cache key counts all sources that they may come from. Called by the modules with inner loops.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache

_Function = TypeVar("_Function", bound=Callable[..., object])
_SOURCES = ("core", "cost", "router/prediction.py", "simulator")


def compiled(function: _Function) -> _Function:
    """For functions that Python calls. The first call in a new environment compiles, later ones load from the cache."""
    dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _PackageCache(function)
    return cast(_Function, dispatcher)


def inner(function: _Function) -> _Function:
    """For functions that only compiled ones call: they become part of these, and have no door to Python."""
    return _inner(function, inline=False)


def inlined(function: _Function) -> _Function:
    """As ``inner``, for small functions with many arguments or one caller: a call would cost more than they do."""
    return _inner(function, inline=True)


def _inner(function: _Function, *, inline: bool) -> _Function:
    # Without ``_nrt`` no array is made, and none is counted at each call either: that took most of the time.
    decorate = numba.njit(
        nogil=True, error_model="numpy", _nrt=False, forceinline=inline, no_cpython_wrapper=True, no_cfunc_wrapper=True
    )
    return cast(_Function, decorate(function))


class _PackageCache(FunctionCache):  # type: ignore[misc]
    def _index_key(self, sig: Any, codegen: Any) -> Any:
        names = self._py_func.__module__.split(".")
        return (*super()._index_key(sig, codegen), _sources(names[1] if names[0] == "loraplex" else "simulator"))


@cache
def _sources(package: str) -> str:
    """A hash over the sources of what a package's functions may call, its own among them: some hundred small files."""
    root = Path(__file__).parent.parent
    named = {root / source for source in (*_SOURCES, package)}
    files = sorted(path for source in named for path in (source.rglob("*.py") if source.is_dir() else (source,)))
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
