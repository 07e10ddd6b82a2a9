"""A PostgreSQL server that says nothing: its host swallows packets, or it accepts connections and hangs.

``PatientConnection`` gives up waiting for an answer, and ``Silence`` spares later calls the wait: after the first one
they fail at once, until the server has answered a probe of the background. A server that refuses or closes connections
is not silent: each call learns that at once. Knows no table. Used by ``connection`` and ``database``.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Engine, event, select
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from loraplex.core.errors import Unavailable

R = TypeVar("R")
logger = logging.getLogger(__name__)

_SILENT_AFTER_S = 1.0
"""A connection that comes to nothing after so long was waited for in vain; less is a refusal."""
_PROBE_INTERVAL_S = 1.0
"""Between two questions whether a silent server answers again; each takes up to the time limits of a connection."""


class ServerSilent(psycopg.OperationalError):
    """No answer within the time limit. The connection is closed."""


class PatientConnection(psycopg.Connection[Any]):
    """A connection that raises ServerSilent instead of waiting for ever."""

    answer_timeout_s: float | None = None
    """The longest wait for any one answer; None: without end."""

    def wait(self, gen: PQGen[R], interval: float = 0.1, timeout: float | None = None) -> R:
        with _waiting():
            try:
                return super().wait(gen, interval, self.answer_timeout_s if timeout is None else timeout)
            except psycopg.OperationalError as error:
                if error.sqlstate is None:
                    # Whatever comes later is no answer to the next question.
                    self.pgconn.finish()
                raise


def connect_patiently(*arguments: Any, answer_timeout_s: float, **parameters: Any) -> PatientConnection:
    """As ``psycopg.connect``; a connection that does not come about in time raises ServerSilent."""
    with _waiting():
        connection = PatientConnection.connect(*arguments, **parameters)
    connection.answer_timeout_s = answer_timeout_s
    return connection


@contextmanager
def _waiting() -> Iterator[None]:
    started_s = time.monotonic()
    try:
        yield
    except psycopg.OperationalError as error:
        # With a state it is an answer: a lock that was not to be had, for example.
        if error.sqlstate is None and time.monotonic() - started_s > _SILENT_AFTER_S:
            raise ServerSilent(str(error)) from error
        raise


class Silence:
    """Whether the server of ``engine`` is silent, by the errors of all that use the engine. For any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._lasts = False
        self._closed = threading.Event()
        event.listen(engine, "handle_error", self._on_error)

    @property
    def lasts(self) -> bool:
        return self._lasts

    def check(self) -> None:
        """Raises Unavailable while the server is silent."""
        if self._lasts:
            raise Unavailable("the control database does not answer")

    def close(self) -> None:
        """No probe begins any more."""
        self._closed.set()

    def _on_error(self, context: ExceptionContext) -> None:
        if not isinstance(context.original_exception, ServerSilent):
            return
        with self._lock:
            if self._lasts or self._closed.is_set():
                return
            self._lasts = True
        logger.warning("the control database is silent; calls fail at once until it answers")
        threading.Thread(target=self._probe, name="database-probe", daemon=True).start()

    def _probe(self) -> None:
        while not self._closed.wait(_PROBE_INTERVAL_S):
            try:
                with self._engine.connect() as connection:
                    connection.execute(select(1))
            except DBAPIError:
                continue
            with self._lock:
                self._lasts = False
            logger.warning("the control database answers again")
            return
