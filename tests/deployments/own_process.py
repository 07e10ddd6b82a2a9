"""Runs functions of a test module in a process of their own: a process can join one Ray at a time, and the one of the
tests has joined that of ``conftest``."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

R = TypeVar("R")


class OwnProcess:
    """All calls run in the same process, one after the other."""

    def __init__(self, start: Callable[..., None], *args: Any) -> None:
        """``start`` (of a module's top level, as all that is called) runs first."""
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.call(start, *args)

    def call(self, function: Callable[..., R], *args: Any, timeout_s: float = 250) -> R:
        """Its result; what it raises is raised here."""
        return self._pool.submit(function, *args).result(timeout_s)

    def close(self, end: Callable[[], None]) -> None:
        """``end`` runs last."""
        try:
            self.call(end)
        finally:
            self._pool.shutdown()
