"""loraplex.v1 over a real channel, and called as Serve's proxy calls it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loraplex.core.errors import BadConfig, LoraplexError, Overloaded
from loraplex.core.request import FinishReason
from loraplex.gateway.grpc_server import SERVICE, GrpcServer
from loraplex.gateway.proto import loraplex_v1_pb2 as pb
from loraplex.gateway.proto import loraplex_v1_pb2_grpc
from loraplex.testing.tiny_adapter import tiny_adapter

from tests.gateway.conftest import ProxyContext

KEY = (("authorization", "Bearer lpx_acme_admin_key_of_the_tests"),)


@pytest.fixture
async def channel(world: Any) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer(world.gateway.grpc_servicer, not_ready=world.gateway.not_ready)
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as made:
        yield made
    await server.stop(grace_s=0.1)


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return loraplex_v1_pb2_grpc.LoraplexStub(channel)


def chat(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="pirate",
        chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="Hi")]),
        sampling=pb.SamplingOptions(**sampling),
    )


def detail(error: grpc.aio.AioRpcError) -> pb.ErrorDetail:
    pairs: Any = error.trailing_metadata()
    metadata = dict(pairs)
    assert metadata["x-request-id"]
    return pb.ErrorDetail.FromString(metadata["loraplex-error-bin"])


async def test_generate(world: Any, stub: Any) -> None:
    world.says("Naïve 東京 🙂", num_cached_tokens=3)
    call = stub.Generate(chat(n=2, seed=5, logprobs=1), metadata=(*KEY, ("x-request-id", "g-1")))
    texts = ["", ""]
    tokens: list[list[int]] = [[], []]
    messages = [message async for message in call]
    for message in messages:
        for delta in message.deltas:
            texts[delta.index] += delta.text
            tokens[delta.index] += delta.token_ids
            assert [token.token_id for token in delta.logprobs] == list(delta.token_ids)
    ids = world.codec.backend.encode("Naïve 東京 🙂").ids
    assert texts == ["Naïve 東京 🙂"] * 2
    assert tokens == [ids, ids]
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].usage.completion_tokens == 2 * len(ids)
    assert messages[-1].usage.cached_tokens == 3
    assert messages[-1].deltas[-1].finish_reason == pb.FINISH_REASON_STOP
    assert dict(await call.trailing_metadata())["x-request-id"] == "g-1"
    assert [request.sampling.seed for request in world.dispatcher.requests] == [5, 6]
    assert world.tracer.rows[0].endpoint == "grpc.generate"


async def test_prompt_forms_and_options(world: Any, stub: Any) -> None:
    ids = world.codec.encode("Hi")
    sampling = pb.SamplingOptions(max_tokens=2, logit_bias={3: 1.5}, stop=["zz"], ignore_eos=True, top_k=4)
    for prompt in ({"text": "Hi"}, {"tokens": pb.TokenPrompt(token_ids=ids)}):
        request = pb.GenerateRequest(model="tiny-base", sampling=sampling, priority=pb.PRIORITY_OFFLINE, **prompt)
        messages = [message async for message in stub.Generate(request, metadata=KEY)]
        assert messages[-1].deltas[0].finish_reason == pb.FINISH_REASON_LENGTH
    for request in world.dispatcher.requests:
        assert request.prompt_token_ids == ids
        assert request.sampling.logit_bias == ((3, 1.5),)
        assert (request.sampling.top_k, request.sampling.ignore_eos, request.priority) == (4, True, "offline")


@pytest.mark.parametrize(
    ("request_", "metadata", "code", "param"),
    [
        (chat(), (), grpc.StatusCode.UNAUTHENTICATED, ""),
        (chat(), (("x-api-key", "nope"),), grpc.StatusCode.UNAUTHENTICATED, ""),
        (chat(), (("x-api-key", "lpx_platform_admin_key_of_the_tests"),), grpc.StatusCode.PERMISSION_DENIED, ""),
        (chat(), (*KEY, ("x-loraplex-tenant", "globex")), grpc.StatusCode.NOT_FOUND, "tenant"),
        (pb.GenerateRequest(model="lawyer", text="x"), KEY, grpc.StatusCode.NOT_FOUND, "model"),
        (pb.GenerateRequest(model="pirate"), KEY, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (pb.GenerateRequest(text="x"), KEY, grpc.StatusCode.INVALID_ARGUMENT, "model"),
        (chat(n=1000), KEY, grpc.StatusCode.INVALID_ARGUMENT, "n"),
        (chat(max_tokens=0), KEY, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (chat(temperature=float("nan")), KEY, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (chat(max_tokens=5000), KEY, grpc.StatusCode.INVALID_ARGUMENT, "messages"),
        (
            pb.GenerateRequest(model="pirate", chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="tool", content="x")])),
            KEY,
            grpc.StatusCode.INVALID_ARGUMENT,
            "chat.messages.0.role",
        ),
    ],
)
async def test_refusals(stub: Any, request_: Any, metadata: Any, code: grpc.StatusCode, param: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request_, metadata=metadata):
            pass
    assert caught.value.code() == code
    assert detail(caught.value).param == param


async def test_overload_says_when_to_retry(world: Any, stub: Any) -> None:
    world.dispatcher.refusal = Overloaded("All replicas are busy.", retry_after_s=2.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(chat(), metadata=KEY):
            pass
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(caught.value).retry_after_s == 2.5


async def test_engine_error_has_the_status_of_its_kind(world: Any, stub: Any) -> None:
    world.says("", finish_reason=FinishReason.ERROR, error="Away.", error_code="unavailable")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(chat(), metadata=KEY):
            pass
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert (detail(caught.value).code, caught.value.details()) == ("unavailable", "Away.")


async def test_bugs_are_internal_without_detail(world: Any, stub: Any) -> None:
    def broken(_request: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    world.dispatcher.script = broken
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(chat(), metadata=KEY):
            pass
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details())


async def test_cancel_aborts(world: Any, stub: Any) -> None:
    world.says("word " * 200)
    world.dispatcher._step_s = 0.01
    call = stub.Generate(chat(max_tokens=200), metadata=KEY)
    await call.read()
    call.cancel()
    await world.eventually(lambda: not world.dispatcher.num_running, timeout_s=1)
    assert len(world.dispatcher.aborted) == 1
    assert world.tracer.rows[-1].status == 499


async def test_models_and_adapters(stub: Any, tmp_path: Path) -> None:
    models = (await stub.ListModels(pb.ListModelsRequest(), metadata=KEY)).models
    assert [model.id for model in models] == ["tiny-base", "pirate"]
    assert models[1].version == 2

    def upload() -> Any:
        yield pb.RegisterAdapterRequest(name="poet")
        for filename, data in tiny_adapter(1).items():
            for piece in (data[:50], data[50:]):
                yield pb.RegisterAdapterRequest(chunk=pb.FileChunk(filename=filename, data=piece))

    made = await stub.RegisterAdapter(upload(), metadata=KEY)
    assert (made.name, made.version, made.lora_rank, made.current) == ("poet", 1, 4, True)
    directory = tmp_path / "approved" / "poet"
    directory.mkdir(parents=True)
    for filename, data in tiny_adapter(2).items():
        (directory / filename).write_bytes(data)
    url = [pb.RegisterAdapterRequest(name="poet"), pb.RegisterAdapterRequest(url=f"file://{directory}")]
    assert (await stub.RegisterAdapter(iter(url), metadata=KEY)).version == 2
    back = await stub.RollbackAdapter(pb.RollbackAdapterRequest(name="poet", version=1), metadata=KEY)
    assert back.version == 1
    versions = (await stub.ListAdapters(pb.ListAdaptersRequest(name="poet"), metadata=KEY)).adapters
    assert [(adapter.version, adapter.current) for adapter in versions] == [(1, True), (2, False)]
    await stub.DeleteAdapter(pb.DeleteAdapterRequest(name="poet", version=2), metadata=KEY)
    await stub.DeleteAdapter(pb.DeleteAdapterRequest(name="poet"), metadata=KEY)
    names = [a.name for a in (await stub.ListAdapters(pb.ListAdaptersRequest(), metadata=KEY)).adapters]
    assert names == ["pirate"]


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [pb.RegisterAdapterRequest(chunk=pb.FileChunk(filename="adapter_config.json"))],
        [pb.RegisterAdapterRequest(name="poet")],
        [pb.RegisterAdapterRequest(name="poet"), pb.RegisterAdapterRequest(name="poet")],
        [
            pb.RegisterAdapterRequest(name="poet"),
            pb.RegisterAdapterRequest(chunk=pb.FileChunk(filename="../x", data=b"")),
        ],
    ],
)
async def test_broken_uploads(world: Any, stub: Any, parts: list[Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RegisterAdapter(iter(parts), metadata=KEY)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not world.control.uploads()


async def test_health_and_reflection(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        async with asyncio.timeout(5):
            while True:
                reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    break
                await asyncio.sleep(0.1)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for reply in reflection.ServerReflectionInfo(iter([request])):
        assert SERVICE in [service.name for service in reply.list_services_response.service]
        break


async def test_called_as_by_a_proxy(world: Any) -> None:
    servicer = world.gateway.grpc_servicer
    context = ProxyContext([("x-api-key", "lpx_acme_admin_key_of_the_tests")])
    text = "".join([m.deltas[0].text async for m in servicer.Generate(chat(), context)])
    assert text == "Hello there."
    assert dict(context.trailing)["x-request-id"]
    refused = ProxyContext([])
    with pytest.raises(LoraplexError):
        await servicer.ListModels(pb.ListModelsRequest(), refused)
    assert refused.code == grpc.StatusCode.UNAUTHENTICATED
    assert "API key" in refused.details

    async def misconfigured(*_args: Any) -> Any:
        raise BadConfig("/srv/secret/control.db is not a control database", param="database.url")

    world.control.set_current = misconfigured
    failed = ProxyContext([("x-api-key", "lpx_acme_admin_key_of_the_tests")])
    with pytest.raises(LoraplexError):
        await servicer.RollbackAdapter(pb.RollbackAdapterRequest(name="pirate", version=1), failed)
    assert failed.code == grpc.StatusCode.INTERNAL
    assert "secret" not in failed.details
    assert pb.ErrorDetail.FromString(dict(refused.trailing)["loraplex-error-bin"]).code == "missing_api_key"
