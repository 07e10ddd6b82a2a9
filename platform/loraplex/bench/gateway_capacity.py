"""How many tokens one core of gateway can stream: ``python -m loraplex.bench.gateway_capacity --streams 256 --json``.

The gateway runs in a process of its own over a dispatcher that replays recorded steps in lockstep (no coalescing); the
clients run in this one. Counted are CPU seconds of the gateway process, all of its threads, requests included.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import uvicorn
from grpc import aio

from loraplex.controller.controller import Controller
from loraplex.core.ids import GatewayId
from loraplex.core.request import EngineRequest, FinishReason, OutputToken
from loraplex.core.tenant import Role
from loraplex.gateway.config import GatewayConfig
from loraplex.gateway.gateway import Gateway
from loraplex.gateway.grpc_server import GrpcServer
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.gateway.proto import loraplex_v1_pb2_grpc
from loraplex.gateway.tokenizer import TextCodec
from loraplex.testing.fake_dispatcher import FakeDispatcher, Script
from loraplex.testing.tiny_controller import TINY_BASE, start_tiny_controller
from loraplex.testing.tiny_tokenizer import build_tiny_tokenizer
from loraplex.traces.recorder import RecorderCounters
from loraplex.traces.row import ArrivalRow, TraceRow

_KEY = "lpx_capacity_key_of_the_measurement"
_TEXT = "Many tenants share one base model, and each of them streams tokens as soon as a step has made them. "
_H100_TOKENS_PER_S = 10_267
"""What one H100 was measured to generate for base-only requests (ARCHITECTURE section 8)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityResult:
    """One protocol."""

    streams: int
    tokens: int
    events: int
    """Events or messages that carried tokens."""
    wall_s: float
    gateway_cpu_s: float
    client_cpu_s: float
    tokens_per_gateway_cpu_s: float
    gateway_cpu_ms_per_token: float
    client_cpu_ms_per_token: float
    gateways_per_h100: float


class _CountingTracer:
    def __init__(self) -> None:
        self.output_tokens = 0

    @property
    def counters(self) -> RecorderCounters:
        return RecorderCounters()

    def arrived(self, row: ArrivalRow) -> None:
        """Not counted."""

    def record(self, row: TraceRow) -> None:
        self.output_tokens += row.output_tokens


def _serve(pipe: Connection, tokenizer: str, streams: int) -> None:
    asyncio.run(_serve_async(pipe, tokenizer, streams))


async def _serve_async(pipe: Connection, tokenizer: str, streams: int) -> None:
    """Serves both protocols. Sends the ports; answers each True with (CPU seconds, output tokens); ends at False."""
    codec = TextCodec(tokenizer)
    ids = codec.encode(_TEXT * 200)

    def script(request: EngineRequest) -> Script:
        tokens = tuple(OutputToken(token_id=ids[i % len(ids)]) for i in range(request.sampling.max_tokens))
        return Script(tokens=tokens, finish_reason=FinishReason.LENGTH)

    with tempfile.TemporaryDirectory() as directory:
        control = await start_tiny_controller(
            Path(directory),
            tokenizer=Path(tokenizer),
            max_context_tokens=1 << 20,
            keys=[("capacity", Role.MEMBER, _KEY)],
        )
        await _serve_with(pipe, control, FakeDispatcher(script, lockstep=True), streams)
        await control.stop()


async def _serve_with(pipe: Connection, control: Controller, dispatcher: FakeDispatcher, streams: int) -> None:
    tracer = _CountingTracer()
    gateway = Gateway(
        GatewayConfig(),
        gateway_id=GatewayId("capacity"),
        control=control,
        dispatcher=dispatcher,
        tracer=tracer,
    )
    await gateway.start()
    grpc_server = GrpcServer(gateway.grpc_servicer, not_ready=gateway.not_ready)
    grpc_port = await grpc_server.start("127.0.0.1:0")
    config = uvicorn.Config(
        gateway.http_app, host="127.0.0.1", port=0, log_level="warning", access_log=False, backlog=2 * streams
    )
    http_server = uvicorn.Server(config)
    serving = asyncio.create_task(http_server.serve())
    while not http_server.started or gateway.not_ready() is not None:  # noqa: ASYNC110 (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    http_port = http_server.servers[0].sockets[0].getsockname()[1]
    pipe.send((http_port, grpc_port))
    while await asyncio.to_thread(pipe.recv):
        pipe.send((_cpu_s(), tracer.output_tokens))
    http_server.should_exit = True
    await serving
    await grpc_server.stop(grace_s=0.1)
    await gateway.stop()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _http_stream(port: int, tokens: int) -> int:
    """One SSE request over a socket of its own; the number of token events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = msgspec.json.encode(
        {
            "model": TINY_BASE,
            "messages": [{"role": "user", "content": _TEXT}],
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {_KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    count = 0
    rest = b""
    while data := await reader.read(65536):
        data = rest + data
        count += data.count(b'data: {"id"')
        rest = data[-10:] if not data.endswith(b"\n") else b""
    writer.close()
    return count


async def _grpc_stream(stub: loraplex_v1_pb2_grpc.LoraplexStub, tokens: int) -> int:
    request = pb.GenerateRequest(
        model=TINY_BASE,
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=_TEXT)]),
        sampling=pb.SamplingOptions(max_tokens=tokens, ignore_eos=True),
    )
    count = 0
    async for _ in stub.Generate(request, metadata=(("x-api-key", _KEY),)):
        count += 1
    return count


async def _drive(protocol: str, port: int, streams: int, tokens: int) -> int:
    if protocol == "http":
        return sum(await asyncio.gather(*(_http_stream(port, tokens) for _ in range(streams))))
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = loraplex_v1_pb2_grpc.LoraplexStub(channel)
        return sum(await asyncio.gather(*(_grpc_stream(stub, tokens) for _ in range(streams))))


def measure(*, streams: int, tokens: int, tokenizer: str | None = None) -> dict[str, CapacityResult]:
    """``http`` and ``grpc``, one after the other: ``streams`` at once, ``tokens`` each. ``tokenizer``: a directory, by
    default a small one made for the run."""
    with tempfile.TemporaryDirectory() as directory:
        source = tokenizer or str(build_tiny_tokenizer(Path(directory) / "tokenizer"))
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, source, streams), daemon=True)
        process.start()
        other.close()
        try:
            ports = dict(zip(("http", "grpc"), pipe.recv(), strict=True))
            results = {}
            for protocol, port in ports.items():
                asyncio.run(_drive(protocol, port, min(8, streams), min(8, tokens)))
                results[protocol] = _measure_one(pipe, protocol, port, streams, tokens)
            pipe.send(False)
            process.join(10)
            return results
        finally:
            if process.is_alive():
                process.terminate()


def _measure_one(pipe: Connection, protocol: str, port: int, streams: int, tokens: int) -> CapacityResult:
    pipe.send(True)
    cpu_before, tokens_before = pipe.recv()
    client_before, start_s = _cpu_s(), time.perf_counter()
    events = asyncio.run(_drive(protocol, port, streams, tokens))
    wall_s, client_cpu_s = time.perf_counter() - start_s, _cpu_s() - client_before
    pipe.send(True)
    cpu_after, tokens_after = pipe.recv()
    cpu_s, num_tokens = cpu_after - cpu_before, tokens_after - tokens_before
    return CapacityResult(
        streams=streams,
        tokens=num_tokens,
        events=events,
        wall_s=round(wall_s, 3),
        gateway_cpu_s=round(cpu_s, 3),
        client_cpu_s=round(client_cpu_s, 3),
        tokens_per_gateway_cpu_s=round(num_tokens / cpu_s, 1),
        gateway_cpu_ms_per_token=round(1e3 * cpu_s / num_tokens, 4),
        client_cpu_ms_per_token=round(1e3 * client_cpu_s / num_tokens, 4),
        gateways_per_h100=round(_H100_TOKENS_PER_S * cpu_s / num_tokens, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second and core that one gateway streams.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="per stream")
    parser.add_argument("--tokenizer", help="directory; by default a small tokenizer made for the run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure(streams=options.streams, tokens=options.tokens, tokenizer=options.tokenizer)
    if options.json:
        print(json.dumps({protocol: asdict(result) for protocol, result in results.items()}, indent=2))
        return
    for protocol, result in results.items():
        print(
            f"{protocol}: {result.tokens_per_gateway_cpu_s:,.0f} tokens/s per core at {result.streams} streams"
            f" ({result.gateway_cpu_ms_per_token} ms CPU per token; client {result.client_cpu_ms_per_token});"
            f" {result.gateways_per_h100} gateways for one H100"
        )


if __name__ == "__main__":
    main()
