"""HTTP/1.1 responses and server-sent events, from bytes in any portions to what they say. No I/O.

Only what a streaming completion needs: status, headers, bodies by length, chunked or until the end of the connection.
Called by ``http_client``; exists because a general client costs more CPU per token than the server under test.
"""

_MAX_HEADER_BYTES = 64 * 1024


class ProtocolError(Exception):
    """The server sent what is not HTTP/1.1."""


class ResponseParser:
    """One response. Feed it until ``complete``."""

    def __init__(self) -> None:
        self.status = 0
        """0 until the header is read."""
        self.headers: dict[str, str] = {}
        """Lower-case names; of repeated headers the last."""
        self.complete = False
        self._buffer = b""
        self._chunked = False
        self._remaining: int | None = None
        """Body bytes to come of the length or of the current chunk; None: unknown yet, or until the end."""
        self._in_trailer = False

    @property
    def keep_alive(self) -> bool:
        """Whether the connection can carry another request after this one."""
        ended_by_length = self._chunked or self._remaining is not None
        nothing_left = not self._buffer and self.headers.get("connection", "").lower() != "close"
        return self.complete and ended_by_length and nothing_left

    def feed(self, data: bytes) -> list[bytes]:
        """Body bytes that ``data`` adds, in order. Raises ProtocolError."""
        self._buffer += data
        if not self.status and not self._read_header():
            return []
        if self.complete:
            return []
        if self._chunked:
            return self._read_chunks()
        body, self._buffer = self._buffer, b""
        if self._remaining is not None:
            body = body[: self._remaining]
            self._remaining -= len(body)
            self.complete = self._remaining == 0
        return [body] if body else []

    def end(self) -> None:
        """The server closed the connection. Raises ProtocolError when the response is cut short."""
        if self.complete:
            return
        if not self.status or self._chunked or self._remaining is not None:
            raise ProtocolError("the connection was closed in the middle of the response")
        self.complete = True

    def _read_header(self) -> bool:
        while not self.status:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > _MAX_HEADER_BYTES:
                    raise ProtocolError("response header longer than 64 KiB")
                return False
            lines = self._buffer[:end].split(b"\r\n")
            self._buffer = self._buffer[end + 4 :]
            version, _, rest = lines[0].partition(b" ")
            code = rest[:3]
            if not version.startswith(b"HTTP/1.") or not code.isdigit() or not 100 <= int(code) <= 599:
                raise ProtocolError(f"not an HTTP/1.1 status line: {lines[0][:80]!r}")
            if int(code) < 200:
                continue  # 100 Continue and the like: the response proper follows
            self.status = int(code)
            for line in lines[1:]:
                name, _, value = line.partition(b":")
                self.headers[name.strip().lower().decode("latin-1")] = value.strip().decode("latin-1")
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self._remaining = 0
        elif not self._chunked and length is not None:
            if not (length.isascii() and length.isdigit()):
                raise ProtocolError(f"content-length is {length[:40]!r}")
            self._remaining = int(length)
        self.complete = self._remaining == 0
        return True

    def _read_chunks(self) -> list[bytes]:
        pieces: list[bytes] = []
        buffer, position = self._buffer, 0
        while True:
            if self._in_trailer:
                end = buffer.find(b"\r\n", position)
                if end < 0:
                    break
                empty, position = end == position, end + 2
                if empty:
                    self.complete = True
                    break
                continue
            if self._remaining is None:
                end = buffer.find(b"\r\n", position)
                if end < 0:
                    if len(buffer) - position > 1024:
                        raise ProtocolError("chunk header longer than 1 KiB")
                    break
                self._remaining = _chunk_size(buffer[position:end])
                position = end + 2
                if self._remaining == 0:
                    self._in_trailer = True
                    continue
            if self._remaining > 0:
                piece = buffer[position : position + self._remaining]
                if not piece:
                    break
                pieces.append(piece)
                position += len(piece)
                self._remaining -= len(piece)
                if self._remaining:
                    break
            if len(buffer) - position < 2:
                break
            if buffer[position : position + 2] != b"\r\n":
                raise ProtocolError("a chunk does not end with CRLF")
            position += 2
            self._remaining = None
        self._buffer = buffer[position:]
        return pieces


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        size = int(digits, 16)
    except ValueError as error:
        raise ProtocolError(f"chunk size is {digits[:40]!r}") from error
    if size < 0 or digits.startswith((b"+", b"-")):
        raise ProtocolError(f"chunk size is {digits[:40]!r}")
    return size


class SseParser:
    """Server-sent events: data lines of each event. Comments, ids and event names are skipped."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The data of every event that ``body`` completes."""
        self._buffer += body
        events: list[bytes] = []
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return events
