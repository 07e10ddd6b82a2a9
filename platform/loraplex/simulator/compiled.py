"""How functions are compiled: to machine code kept on disk, without the GIL. Called by the modules with inner loops."""

from collections.abc import Callable
from typing import TypeVar, cast

import numba

_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """numba's nopython mode; the first call in a new environment compiles (seconds), later ones load from the cache."""
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))


def inlined(function: _Function) -> _Function:
    """For small functions that compiled ones call."""
    return cast(_Function, numba.njit(cache=True, nogil=True, inline="always")(function))
