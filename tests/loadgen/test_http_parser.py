"""The parsers give the same result however the bytes are cut, and refuse what is not HTTP."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.loadgen.http_parser import ProtocolError, ResponseParser, SseParser

_bodies = st.lists(st.binary(min_size=1, max_size=60), max_size=6)


def _feed(parser: ResponseParser, data: bytes, cuts: list[int]) -> bytes:
    body = b""
    positions = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in pairwise(positions):
        body += b"".join(parser.feed(data[start:end]))
    return body


@given(_bodies, st.lists(st.integers(0, 10_000), max_size=12), st.booleans())
def test_chunked(pieces: list[bytes], cuts: list[int], trailer: bool) -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Thing: a\r\n\r\n"
    for piece in pieces:
        data += b"%X;ext=1\r\n" % len(piece) + piece + b"\r\n"
    data += b"0\r\n" + (b"x-trailer: 1\r\n" if trailer else b"") + b"\r\n"
    parser = ResponseParser()
    assert _feed(parser, data, cuts) == b"".join(pieces)
    assert (parser.status, parser.complete, parser.keep_alive) == (200, True, True)
    assert parser.headers["x-thing"] == "a"


@given(st.binary(max_size=100), st.lists(st.integers(0, 10_000), max_size=12))
def test_by_length_after_an_interim_response(body: bytes, cuts: list[int]) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 No\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    parser = ResponseParser()
    assert _feed(parser, data, cuts) == body
    assert (parser.status, parser.complete, parser.keep_alive) == (429, True, True)


def test_until_the_end() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.0 200 OK\r\n\r\nabc") == [b"abc"]
    assert not parser.complete
    parser.end()
    assert parser.complete
    assert not parser.keep_alive


def test_connection_close_is_respected() -> None:
    parser = ResponseParser()
    parser.feed(b"HTTP/1.1 200 OK\r\nconnection: Close\r\ncontent-length: 0\r\n\r\n")
    assert parser.complete
    assert not parser.keep_alive


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabc",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 70_000,
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseParser().feed(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
)
def test_a_cut_response_is_told_from_a_whole_one(data: bytes) -> None:
    parser = ResponseParser()
    parser.feed(data)
    with pytest.raises(ProtocolError):
        parser.end()


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=10)), max_size=6), st.lists(st.integers(0, 10_000))
)
def test_events(values: list[dict[str, str]], cuts: list[int]) -> None:
    data = b": comment\n\n"
    for index, value in enumerate(values):
        end = b"\r\n" if index % 2 else b"\n"
        data += b"event: x" + end + b"data: " + json.dumps(value).encode() + end + end
    parser = SseParser()
    events = []
    positions = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, stop in pairwise(positions):
        events += parser.feed(data[start:stop])
    assert [json.loads(event) for event in events] == values


def test_multi_line_event() -> None:
    assert SseParser().feed(b"data: a\ndata:b\n\ndata: c") == [b"a\nb"]
