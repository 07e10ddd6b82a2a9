"""Connections between a group's executor and its ranks: TCP, one frame a message, opened with a shared secret.

The secret goes to the ranks with their launch; whoever does not know it is refused. Frames are not encrypted: ranks and
executor share a machine or a cluster's own network.
"""

import os
import socket
import struct
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

_KEY_BYTES = 32
_HANDSHAKE_S = 20


class RankListener:
    """Where ranks connect to."""

    def __init__(self, host: str) -> None:
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address: tuple[str, int] = (host, self._socket.getsockname()[1])
        self.key = os.urandom(_KEY_BYTES)

    def accept(self, timeout_s: float) -> "Connection | None":
        """The next connection; None when nobody came in time, or a stranger."""
        self._socket.settimeout(timeout_s)
        try:
            accepted, _ = self._socket.accept()
        except TimeoutError:
            return None
        connection = _wrap(accepted)
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
        except (AuthenticationError, OSError, EOFError):
            connection.close()
            return None
        _set_timeout(connection, 0)
        return connection

    def close(self) -> None:
        self._socket.close()


def connect(address: tuple[str, int], key: bytes) -> "Connection":
    """Raises OSError, EOFError or multiprocessing.AuthenticationError."""
    connection = _wrap(socket.create_connection(address, timeout=_HANDSHAKE_S))
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    _set_timeout(connection, 0)
    return connection


def shut_down(connection: "Connection") -> None:
    """Ends it also for a thread that reads from it or writes to it now."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
    except OSError:
        # It is closed already, by this side or the other.
        return


def _wrap(connected: socket.socket) -> "Connection":
    connected.settimeout(None)
    # A message in two packets would wait for the acknowledgement of the first.
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = Connection(connected.detach())
    _set_timeout(connection, _HANDSHAKE_S)
    return connection


def _set_timeout(connection: "Connection", seconds: int) -> None:
    """For each read; 0: none."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
