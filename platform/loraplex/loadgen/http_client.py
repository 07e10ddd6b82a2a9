"""A lean HTTP/1.1 client for streaming answers: one asyncio protocol per connection, idle ones are used again.

Owns the connections. Body bytes reach the caller inside the event loop's read callback, so that the caller's
clock reading is the arrival and a token costs no task switch. Called by ``completion``.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from loraplex.core.errors import BadConfig
from loraplex.loadgen.http_parser import ProtocolError, ResponseParser

_MAX_ERROR_BYTES = 64 * 1024
_STALE_S = 0.1
"""A connection that the server closed while it was idle breaks within a round trip of the request. One that breaks
later may have had the request served, which is not to be sent twice."""


class ConnectFailed(Exception):
    """No connection: refused, unknown host, out of file descriptors, or too slow."""


class ConnectionBroken(Exception):
    """The connection ended before the response did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    error_body: bytes
    """Of an answer other than 200, at most 64 KiB; otherwise empty."""


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.closed = False
        self.received = False
        """Whether the server answered anything to the current request."""
        self.sent_s = 0.0
        """Event loop's time at which the current request was sent."""
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._on_body: Callable[[bytes], None] | None = None
        self._error_body = bytearray()
        self._done: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def request(self, data: bytes, on_body: Callable[[bytes], None]) -> "asyncio.Future[Answer]":
        assert self._transport is not None
        self._parser = ResponseParser()
        self._on_body = on_body
        self._error_body.clear()
        self.received = False
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        self.sent_s = loop.time()
        self._transport.write(data)
        return self._done

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            self.close()  # nobody asked: not a connection to trust with the next request
            return
        self.received = True
        try:
            pieces = self._parser.feed(data)
        except ProtocolError as error:
            self._fail(ConnectionBroken(str(error)))
            return
        if self._parser.status == 200:
            assert self._on_body is not None
            for piece in pieces:
                self._on_body(piece)
        else:
            for piece in pieces:
                self._error_body += piece[: _MAX_ERROR_BYTES - len(self._error_body)]
        if self._parser.complete:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is None or self._done.done():
            return
        try:
            self._parser.end()
        except ProtocolError as error:
            self._fail(ConnectionBroken(str(exc or error)))
        else:
            self._finish()

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def _finish(self) -> None:
        assert self._done is not None
        if not self._parser.keep_alive:
            self.close()
        self._done.set_result(Answer(status=self._parser.status, error_body=bytes(self._error_body)))

    def _fail(self, error: Exception) -> None:
        assert self._done is not None
        self._done.set_exception(error)
        self.close()


class HttpClient:
    """Requests to one server. No limit on connections: an open-loop generator must never wait for one."""

    def __init__(self, url: str, *, connect_timeout_s: float) -> None:
        """``url``: http or https, with an optional path prefix. Raises BadConfig for anything else."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise BadConfig(f"URL {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadConfig(f"URL {url} is not of the form http://HOST[:PORT]")
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._authority = parts.netloc.rpartition("@")[2]
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[_Connection] = []
        self.num_connects = 0

    def encode_post(self, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
        """The bytes of a POST; made ahead of the time at which they are sent."""
        lines = [f"POST {self._prefix}{path} HTTP/1.1", f"host: {self._authority}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    async def send(self, data: bytes, on_body: Callable[[bytes], None], *, timeout_s: float) -> Answer:
        """Sends ``encode_post``'s bytes; ``on_body`` gets each piece of a 200 answer's body as it arrives.

        Raises ConnectFailed, ConnectionBroken, TimeoutError. A connection that turns out to have been closed while idle
        is replaced without notice.
        """
        async with asyncio.timeout(timeout_s):
            while self._idle:
                connection = self._idle.pop()
                if connection.closed:
                    continue
                try:
                    return await self._use(connection, data, on_body)
                except ConnectionBroken:
                    if connection.received or asyncio.get_running_loop().time() - connection.sent_s > _STALE_S:
                        raise
            return await self._use(await self._connect(), data, on_body)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _use(self, connection: _Connection, data: bytes, on_body: Callable[[bytes], None]) -> Answer:
        try:
            answer = await connection.request(data, on_body)
        except BaseException:
            connection.close()
            raise
        if not connection.closed:
            self._idle.append(connection)
        return answer

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        self.num_connects += 1
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except TimeoutError as error:
            raise ConnectFailed(f"no connection within {self._connect_timeout_s} s") from error
        except OSError as error:
            raise ConnectFailed(str(error)) from error
        return connection
