"""A small server that streams completions, with delays and faults by the name of the model."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class StreamServer:
    """``model`` says what happens: ``ok``, ``slow``, ``busy`` (429), ``length`` (500), ``cut``, ``nodone``, ``inband``,
    ``silent``, ``stall`` (the whole server stops for half a second), ``die`` (closes after a while, nothing answered),
    ``stale`` (closes at once)."""

    port: int = 0
    token_s: float = 0.001
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    num_connections: int = 0
    busy_until_s: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        header = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.split(": ", 1) for line in header.split("\r\n")[1:] if line)
        body = json.loads(await reader.readexactly(int(fields["content-length"])))
        loop = asyncio.get_running_loop()
        self.arrivals_s.append(loop.time())
        self.bodies.append(body)
        self.keys.append(fields.get("authorization", ""))
        model = body["model"]
        if model == "stall":
            self.busy_until_s = loop.time() + 0.5
        await asyncio.sleep(max(0.0, self.busy_until_s - loop.time()))
        if model in ("busy", "length"):
            error = json.dumps({"error": {"message": "too many", "type": "x", "param": None, "code": "y"}}).encode()
            head = "HTTP/1.1 429 Too Many Requests" if model == "busy" else "HTTP/1.1 500 Oops"
            writer.write(f"{head}\r\ncontent-length: {len(error)}\r\n\r\n".encode() + error)
            return True
        if model in ("die", "stale"):
            await asyncio.sleep(0.3 if model == "die" else 0.0)
            return False
        if model == "silent":
            await asyncio.sleep(3600)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        count = body["max_tokens"]
        for index in range(count):
            await asyncio.sleep(0.05 if model == "slow" else self.token_s)
            if model == "cut" and index == 2:
                return False
            if model == "inband" and index == 2:
                _event(writer, {"error": {"message": "replica lost"}})
                break
            _event(writer, {"choices": [{"index": 0, "text": " a", "finish_reason": None}]})
        _event(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        _event(writer, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
        if model != "nodone":
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True


def _event(writer: asyncio.StreamWriter, value: object) -> None:
    _chunk(writer, b"data: " + json.dumps(value).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n" % len(data) + data + b"\r\n")


@pytest.fixture
async def server() -> AsyncIterator[StreamServer]:
    made = StreamServer()
    listening = await asyncio.start_server(made.handle, "127.0.0.1", 0)
    made.port = listening.sockets[0].getsockname()[1]
    yield made
    listening.close()
