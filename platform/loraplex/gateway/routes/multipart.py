"""A multipart body read as a stream: nothing is spooled, pieces of files come out as they come in.

Used by the adapter upload. Owns the parser's state; knows field names only as strings.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from loraplex.core.errors import InvalidInput

_MAX_HEADER_BYTES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some bytes of one part; a part without bytes gives one empty piece."""

    field: str
    filename: str | None
    """None for a plain field."""
    data: bytes


class _Parts:
    """Collects what the parser's callbacks say."""

    def __init__(self) -> None:
        self.ready: list[Piece] = []
        self.ended = False
        self._header_name = b""
        self._header_value = b""
        self._header_bytes = 0
        self._field = ""
        self._filename: str | None = None

    def on_part_begin(self) -> None:
        self._field, self._filename, self._header_bytes = "", None, 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(self._header_value)
            self._field = options.get(b"name", b"").decode("utf-8", "replace")
            filename = options.get(b"filename")
            self._filename = None if filename is None else filename.decode("utf-8", "replace")
        self._header_name = self._header_value = b""

    def on_headers_finished(self) -> None:
        self.ready.append(Piece(field=self._field, filename=self._filename, data=b""))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.ready.append(Piece(field=self._field, filename=self._filename, data=data[start:end]))

    def on_end(self) -> None:
        self.ended = True

    def _count(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise InvalidInput("The headers of a multipart part are too long.")


async def multipart_pieces(request: Request) -> AsyncIterator[Piece]:
    """In order of arrival. Raises InvalidInput for a body that is not sound multipart/form-data, or is cut short."""
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidInput("The multipart content-type names no boundary.")
    parts = _Parts()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.on_part_begin,
                "on_part_data": parts.on_part_data,
                "on_header_field": parts.on_header_field,
                "on_header_value": parts.on_header_value,
                "on_header_end": parts.on_header_end,
                "on_headers_finished": parts.on_headers_finished,
                "on_end": parts.on_end,
            },
        )
        async for chunk in request.stream():
            parser.write(chunk)
            for piece in parts.ready:
                yield piece
            parts.ready.clear()
    except FormParserError as error:
        raise InvalidInput(f"The multipart body is malformed: {error}") from error
    if not parts.ended:
        raise InvalidInput("The multipart body ends before its last boundary.")
