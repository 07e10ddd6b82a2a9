"""A real uvicorn with the official client, and with a bare socket that goes away."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import uvicorn


@pytest.fixture
async def port(world: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(world.gateway.http_app, host="127.0.0.1", port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await world.eventually(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


@pytest.fixture
async def client(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        api_key="lpx_acme_admin_key_of_the_tests", base_url=f"http://127.0.0.1:{port}/t/acme/v1", max_retries=0
    ) as made:
        yield made


async def test_openai_client(world: Any, client: openai.AsyncOpenAI) -> None:
    assert [model.id for model in (await client.models.list()).data] == ["tiny-base", "pirate"]
    assert (await client.models.retrieve("pirate")).id == "pirate"
    messages: Any = [{"role": "user", "content": "Hi"}]
    reply = await client.chat.completions.create(model="pirate", messages=messages, logprobs=True, top_logprobs=1)
    assert reply.choices[0].message.content == "Hello there."
    assert reply.choices[0].logprobs is not None
    stream = await client.chat.completions.create(
        model="pirate", messages=messages, stream=True, n=2, stream_options={"include_usage": True}
    )
    texts = ["", ""]
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello there."] * 2
    assert usage is not None
    assert usage.completion_tokens == 2 * len(world.codec.backend.encode("Hello there.").ids)
    completion = await client.completions.create(model="tiny-base", prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in completion.choices] == ["Hello there."] * 2


async def test_openai_client_reads_choices_stops_and_logprobs(world: Any, client: openai.AsyncOpenAI) -> None:
    world.says("One two three four.", num_cached_tokens=2)
    stream = await client.chat.completions.create(
        model="pirate",
        messages=[{"role": "user", "content": "Hi"}],
        n=2,
        stop=[" four"],
        logprobs=True,
        top_logprobs=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    for index in (0, 1):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(choice.delta.content or "" for choice in own) == "One two three"
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]
        entries = [entry for choice in own for entry in (choice.logprobs.content if choice.logprobs else None) or []]
        assert "".join(entry.token for entry in entries).startswith("One two three")
        assert all(len(entry.top_logprobs) == 1 for entry in entries)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2
    whole = await client.completions.create(model="pirate", prompt=["a", "b"], n=2, logprobs=1, max_tokens=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert all(choice.finish_reason == "length" for choice in whole.choices)
    assert all(choice.logprobs and len(choice.logprobs.tokens or []) == 3 for choice in whole.choices)


async def test_openai_client_reads_errors(world: Any, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="lawyer", prompt="x")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model="pirate", prompt="x", n=1000)


async def test_events_arrive_step_by_step(world: Any, client: openai.AsyncOpenAI) -> None:
    world.says("The quick brown fox jumps over the lazy dog.")
    world.dispatcher._step_s = 0.02
    loop = asyncio.get_running_loop()
    times = []
    stream = await client.completions.create(model="pirate", prompt="x", stream=True, max_tokens=8)
    async for _ in stream:
        times.append(loop.time())
    assert len(times) == 8
    assert times[-1] - times[0] > 0.1


@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_aborts_at_once(world: Any, port: int, stream: bool) -> None:
    world.says("word " * 200)
    world.dispatcher._step_s = 0.01
    body = json.dumps({"model": "pirate", "prompt": "x", "max_tokens": 200, "stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer lpx_acme_admin_key_of_the_tests\r\n"
        b"content-type: application/json\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
    if stream:
        await reader.readuntil(b"data: ")
    await world.eventually(lambda: world.dispatcher.num_running)
    writer.close()
    await world.eventually(lambda: not world.dispatcher.num_running, timeout_s=0.5)
    assert len(world.dispatcher.aborted) == 1
    await asyncio.sleep(0.02)
    (row,) = world.tracer.rows
    assert (row.status, row.finish_reason) == (499, "abort")
    assert row.output_tokens < 200


async def test_keep_alive_serves_several_streams_on_one_connection(world: Any, port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": "pirate", "prompt": "x", "stream": True}).encode()
    for _ in range(3):
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer lpx_acme_admin_key_of_the_tests\r\n"
            b"content-type: application/json\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        async with asyncio.timeout(5):
            await reader.readuntil(b"data: [DONE]\n\n")
            await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    assert [row.status for row in world.tracer.rows] == [200] * 3


async def test_upload_that_breaks_off_leaves_nothing(world: Any, port: int) -> None:
    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    part = b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n'
    writer.write(
        b"POST /v1/adapters HTTP/1.1\r\nhost: x\r\nauthorization: Bearer lpx_acme_admin_key_of_the_tests\r\n"
        b"content-type: multipart/form-data; boundary=b\r\ncontent-length: 100000\r\n\r\n"
        + part % b"name"
        + b"poet\r\n"
        + part % b"adapter_config.json"
        + b"{}"
    )
    await world.eventually(world.control.uploads)
    writer.close()
    await world.eventually(lambda: not world.control.uploads())
    assert (await world.http.get("/v1/adapters/poet")).status_code == 404
