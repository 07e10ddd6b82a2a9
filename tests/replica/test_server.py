"""The stream server against raw gRPC clients that misbehave."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId, Digest, GatewayId, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.core.wire import SECRET_METADATA_KEY, STREAM_METHOD, GatewayFrame, Hello, decode_replica_frame, encode
from loraplex.engine import EngineConfig
from loraplex.replica.config import ReplicaConfig
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.server import ReplicaServer
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens, fake_manifest, fake_model

HELLO = encode(GatewayFrame(hello=Hello(gateway_id=GatewayId("g"))))


class Source:
    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        yield fake_manifest(digest), "path"


@pytest.fixture
async def server() -> AsyncIterator[tuple[EngineLoop, int]]:
    loop = EngineLoop(
        replica_id=ReplicaId("r"),
        executor=FakeExecutor(model=fake_model(max_context_tokens=8192), num_pages=4096),
        engine_config=EngineConfig(max_running=4),
        source=Source(),
    )
    loop.start()
    server = ReplicaServer(loop, cluster_secret="secret", config=ReplicaConfig(stop_grace_s=0))
    yield loop, await server.start("127.0.0.1")
    await server.stop()


def connect(channel: grpc.aio.Channel, secret: str | None = "secret") -> Any:
    metadata = () if secret is None else ((SECRET_METADATA_KEY, secret),)
    method = channel.stream_stream(STREAM_METHOD, request_serializer=bytes, response_deserializer=bytes)
    return method(None, metadata=metadata)


@pytest.mark.parametrize("secret", [None, "", "Secret", "secret "])
async def test_a_stranger_is_refused_and_learns_nothing(server: tuple[EngineLoop, int], secret: str | None) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server[1]}") as channel:
        call = connect(channel, secret)
        assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
        assert await call.details() == "wrong cluster secret"


@pytest.mark.parametrize("first", [b"", b"\xff\xff", encode(GatewayFrame())])
async def test_a_stream_must_begin_with_hello(server: tuple[EngineLoop, int], first: bytes) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server[1]}") as channel:
        call = connect(channel)
        await call.write(first)
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_another_protocol_is_refused(server: tuple[EngineLoop, int]) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server[1]}") as channel:
        call = connect(channel)
        await call.write(encode(GatewayFrame(hello=Hello(gateway_id=GatewayId("g"), protocol_version=99))))
        assert await call.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_bad_frame_ends_the_stream_and_its_requests(server: tuple[EngineLoop, int]) -> None:
    loop, port = server
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = connect(channel)
        await call.write(HELLO)
        await call.write(encode(GatewayFrame(submits=(make("r", max_tokens=5000),))))
        while not decode_replica_frame(await call.read()).outputs:
            pass
        assert loop.num_unfinished == 1
        await call.write(b"\xc1not msgpack")
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await _read_to_the_end(call)
        assert broken.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        again = connect(channel)
        await again.write(HELLO)
        load = decode_replica_frame(await again.read()).load
        assert load is not None
        assert load.num_running == 0


async def test_a_slow_gateway_gets_fewer_frames_and_every_token(server: tuple[EngineLoop, int]) -> None:
    # Frames are some 200 bytes long: the windows hold a few hundred frames; 1500 steps pass them.
    loop, port = server
    requests = tuple(make(f"r{i}", max_tokens=1500, start=i) for i in range(4))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=(("grpc.http2.bdp_probe", 0),)) as channel:
        call = connect(channel)
        await call.write(HELLO)
        await call.write(encode(GatewayFrame(submits=requests)))
        first = decode_replica_frame(await call.read())
        assert first.replica is not None
        while loop.num_unfinished:  # noqa: ASYNC110  (the engine tells nobody else)
            await asyncio.sleep(0.01)
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        unfinished, num_frames = len(requests), 0
        frame = first
        while True:
            num_frames += 1
            for output in frame.outputs:
                tokens[output.request_id].extend(token.token_id for token in output.tokens)
                unfinished -= output.finish_reason is not None
            if not unfinished:
                break
            frame = decode_replica_frame(await call.read())
        for request in requests:
            assert tuple(tokens[request.request_id][:50]) == expected_tokens(request, 50)
            assert len(tokens[request.request_id]) == 1500
        assert num_frames < 1500


async def test_a_gateway_that_reads_nothing_is_cut_off_and_its_requests_end() -> None:
    executor = FakeExecutor(model=fake_model(max_context_tokens=1 << 20), num_pages=1 << 16)
    loop = EngineLoop(
        replica_id=ReplicaId("r"), executor=executor, engine_config=EngineConfig(max_running=4), source=Source()
    )
    loop.start()
    server = ReplicaServer(loop, cluster_secret="secret", config=ReplicaConfig(stop_grace_s=0, max_unsent_tokens=500))
    port = await server.start("127.0.0.1")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=(("grpc.http2.bdp_probe", 0),)) as channel:
        call = connect(channel)
        await call.write(HELLO)
        await call.write(encode(GatewayFrame(submits=(make("r", max_tokens=100_000),))))
        while not decode_replica_frame(await call.read()).outputs:  # the first frame may come before the request does
            pass
        async with asyncio.timeout(10):
            while loop.num_unfinished:  # noqa: ASYNC110  (the engine tells nobody else)
                await asyncio.sleep(0.02)
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await _read_to_the_end(call)
        assert broken.value.code() == grpc.StatusCode.ABORTED
    await server.stop()


async def test_a_gateway_that_comes_back_takes_the_place_of_its_old_stream(
    server: tuple[EngineLoop, int], caplog: pytest.LogCaptureFixture
) -> None:
    loop, port = server
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        old = connect(channel)
        await old.write(HELLO)
        await old.write(encode(GatewayFrame(submits=(make("r", max_tokens=5000),))))
        await old.read()
        new = connect(channel)
        await new.write(HELLO)
        await new.write(encode(GatewayFrame(submits=(make("r", max_tokens=3),))))
        got: list[int] = []
        while len(got) < 3:
            got += [t.token_id for o in decode_replica_frame(await new.read()).outputs for t in o.tokens]
        assert tuple(got) == expected_tokens(make("r", max_tokens=3), 3)
        new.cancel()
        with pytest.raises(grpc.aio.AioRpcError):
            await _read_to_the_end(old)
        assert loop.num_unfinished == 0
    assert "KeyError" not in caplog.text


async def test_a_taken_port_is_named(server: tuple[EngineLoop, int]) -> None:
    other = ReplicaServer(server[0], cluster_secret="s", config=ReplicaConfig(port=server[1]))
    with pytest.raises(BadConfig, match=str(server[1])):
        await other.start("127.0.0.1")


async def _read_to_the_end(call: Any) -> None:
    while isinstance(await call.read(), bytes):
        pass


def make(name: str, *, max_tokens: int, start: int = 0) -> EngineRequest:
    return EngineRequest(
        request_id=RequestId(name),
        tenant=TenantName("t"),
        base_model_id=BaseModelId("fake-base"),
        adapter=None,
        prompt_token_ids=(start, 1, 2),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        arrival_s=0.0,
        cache_salt="t",
    )
