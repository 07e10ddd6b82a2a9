"""POST /v1/chat/completions over the ASGI transport."""

import json
from typing import Any

import pytest
from loraplex.core.errors import Overloaded, ReplicaLost
from loraplex.core.request import FinishReason


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}], **fields}


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


async def test_whole_reply(world: Any) -> None:
    reply = await world.http.post("/v1/chat/completions", json=body(seed=3))
    assert reply.status_code == 200, reply.text
    data = reply.json()
    assert data["object"] == "chat.completion"
    assert data["model"] == "pirate"
    choice = data["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello there.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    request = world.dispatcher.requests[0]
    assert data["usage"]["prompt_tokens"] == len(request.prompt_token_ids)
    assert data["usage"]["completion_tokens"] == len(world.codec.backend.encode("Hello there.").ids)
    assert request.adapter.name == "pirate"
    assert request.adapter.version == 2
    tenants = {tenant.name: tenant for tenant in world.gateway._view.snapshot.tenants}
    assert request.cache_salt == tenants["acme"].cache_salt != tenants["globex"].cache_salt
    assert request.sampling.seed == 3
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert world.codec.backend.decode(list(request.prompt_token_ids), skip_special_tokens=False) == expected


async def test_stream(world: Any) -> None:
    world.says("Naïve café: 東京 🙂!", num_cached_tokens=2)
    reply = await world.http.post(
        "/v1/chat/completions", json=body(stream=True, stream_options={"include_usage": True})
    )
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    chunks = events(reply.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "Naïve café: 東京 🙂!"
    assert all(delta.get("content") or i == len(deltas) - 1 for i, delta in enumerate(deltas))
    assert not any("\ufffd" in delta.get("content", "") for delta in deltas)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(deltas) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_stream_without_usage_has_no_usage_field(world: Any) -> None:
    reply = await world.http.post("/v1/chat/completions", json=body(stream=True))
    assert all("usage" not in chunk for chunk in events(reply.text))


async def test_choices_have_seeds_of_their_own(world: Any) -> None:
    reply = await world.http.post("/v1/chat/completions", json=body(n=3, seed=10, stream=True))
    chunks = events(reply.text)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1, 2}
    assert [request.sampling.seed for request in world.dispatcher.requests] == [10, 11, 12]
    assert len({request.request_id for request in world.dispatcher.requests}) == 3


async def test_missing_seed_is_drawn(world: Any) -> None:
    for _ in range(2):
        await world.http.post("/v1/chat/completions", json=body())
    first, second = (request.sampling.seed for request in world.dispatcher.requests)
    assert first != second
    assert 0 <= first < 2**63


async def test_stop_string_is_cut_and_engine_aborted(world: Any) -> None:
    world.says("The quick brown fox jumps over the lazy dog.")
    for stream in (False, True):
        world.dispatcher.aborted.clear()
        reply = await world.http.post("/v1/chat/completions", json=body(stop=["wn fo", "zzz"], stream=stream))
        if stream:
            chunks = events(reply.text)
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            text = reply.json()["choices"][0]["message"]["content"]
            reason = reply.json()["choices"][0]["finish_reason"]
        assert text == "The quick bro"
        assert reason == "stop"
        assert len(world.dispatcher.aborted) == 1


async def test_stop_of_one_choice_leaves_the_others(world: Any) -> None:
    texts = {"0": "one STOP two three", "1": "four five six"}
    world.dispatcher.script = lambda request: world.script(texts[request.request_id[-1]])(request)
    reply = await world.http.post("/v1/chat/completions", json=body(n=2, stop="STOP"))
    contents = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert contents == ["one ", "four five six"]
    assert len(world.dispatcher.aborted) == 1


async def test_logprobs(world: Any) -> None:
    world.says("Hi 🙂")
    reply = await world.http.post("/v1/chat/completions", json=body(logprobs=True, top_logprobs=2))
    content = reply.json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "Hi 🙂"
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in content)


async def test_max_completion_tokens_wins_and_ends_with_length(world: Any) -> None:
    world.says("The quick brown fox jumps over the lazy dog.")
    reply = await world.http.post("/v1/chat/completions", json=body(max_tokens=9, max_completion_tokens=2))
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    assert reply.json()["usage"]["completion_tokens"] == 2


async def test_default_max_tokens_is_the_rest_of_the_context(world: Any) -> None:
    await world.http.post("/v1/chat/completions", json=body())
    request = world.dispatcher.requests[0]
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)


async def test_context_too_long(world: Any) -> None:
    reply = await world.http.post("/v1/chat/completions", json=body(max_tokens=256))
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert reply.json()["error"]["param"] == "messages"


async def test_content_parts_and_developer_role(world: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    reply = await world.http.post("/v1/chat/completions", json=body(messages=messages))
    assert reply.status_code == 200
    prompt = world.codec.backend.decode(list(world.dispatcher.requests[0].prompt_token_ids), skip_special_tokens=False)
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nab<|im_end|>" in prompt


async def test_refusal_of_the_router_has_its_own_status_also_when_streaming(world: Any) -> None:
    world.dispatcher.refusal = Overloaded("All replicas are busy.", retry_after_s=2.5)
    for stream in (False, True):
        reply = await world.http.post("/v1/chat/completions", json=body(stream=stream))
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "3"
        assert reply.json()["error"]["type"] == "overloaded_error"
    assert [row.status for row in world.tracer.rows] == [429, 429]
    assert [row.arrival_s for row in world.tracer.arrivals] == [row.arrival_s for row in world.tracer.rows]
    assert min(row.prompt_tokens for row in world.tracer.rows) > 0, "load that was refused"


async def test_what_we_refuse_costs_the_tenant_no_tokens(world: Any) -> None:
    world.dispatcher.refusal = Overloaded("All replicas are busy.", retry_after_s=2.5)
    assert (await world.http.post("/v1/chat/completions", json=body())).status_code == 429
    assert 'kind="prompt"' not in (await world.http.get("/metrics")).text
    await world.gateway.stop()
    (usage,) = world.control.rows_of("report_usage")
    assert (usage.requests, usage.prompt_tokens, usage.output_tokens) == (1, 0, 0)


async def test_every_refused_call_leaves_a_row(world: Any) -> None:
    for fields in ({"model": "nobody"}, {"n": 1000}, {"max_tokens": 10_000}):
        reply = await world.http.post("/v1/chat/completions", json=body(**fields))
        assert reply.status_code in (400, 404)
    assert [(row.status, row.base_model_id) for row in world.tracer.rows] == [
        (404, None),
        (400, None),
        (400, "tiny-base"),
    ]
    assert world.tracer.arrivals == [], "no load"


async def test_an_arrival_is_told_before_anything_is_generated(world: Any) -> None:
    at_dispatch: list[tuple[int, int]] = []
    says = world.script("Hello")

    def script(request: Any) -> Any:
        at_dispatch.append((len(world.tracer.arrivals), len(world.tracer.rows)))
        return says(request)

    world.dispatcher.script = script
    assert (await world.http.post("/v1/chat/completions", json=body(model="pirate"))).status_code == 200
    assert at_dispatch == [(1, 0)]
    (arrival,), (row,) = world.tracer.arrivals, world.tracer.rows
    assert (arrival.adapter_name, arrival.base_model_id, arrival.tenant) == ("pirate", "tiny-base", "acme")
    assert all(getattr(arrival, name) == getattr(row, name) for name in arrival.__dataclass_fields__)


async def test_loss_before_the_first_token_is_503(world: Any) -> None:
    world.dispatcher.loss = ReplicaLost("No replica is left.")
    world.says("Hello", lost_after=0)
    reply = await world.http.post("/v1/chat/completions", json=body(stream=True))
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "replica_lost"


async def test_loss_in_the_middle_is_an_error_event(world: Any) -> None:
    world.dispatcher.loss = ReplicaLost("No replica is left.")
    world.says("The quick brown fox", lost_after=2)
    reply = await world.http.post("/v1/chat/completions", json=body(stream=True))
    assert reply.status_code == 200
    assert events(reply.text)[-1]["error"]["code"] == "replica_lost"
    assert world.tracer.rows[-1].status == 503
    assert world.tracer.rows[-1].output_tokens == 2


async def test_engine_error_is_500_with_its_sentence(world: Any) -> None:
    world.says("Hello", finish_reason=FinishReason.ERROR, error="The adapter cannot be loaded.")
    reply = await world.http.post("/v1/chat/completions", json=body())
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "The adapter cannot be loaded."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("context_length_exceeded", 400, "invalid_request_error"),
        ("invalid_value", 400, "invalid_request_error"),
        ("invalid_adapter", 400, "invalid_request_error"),
        ("not_found", 404, "invalid_request_error"),
        ("overloaded", 429, "overloaded_error"),
        ("unavailable", 503, "server_error"),
        ("storage_full", 507, "server_error"),
        ("generation_failed", 500, "server_error"),
        ("of_a_newer_replica", 500, "server_error"),
        (None, 500, "server_error"),
    ],
)
async def test_engine_error_has_the_status_of_its_kind(
    world: Any, code: str | None, status: int, kind: str, stream: bool
) -> None:
    world.says("", finish_reason=FinishReason.ERROR, error="A sentence.", error_code=code)
    reply = await world.http.post("/v1/chat/completions", json=body(stream=stream))
    assert reply.status_code == status
    error = reply.json()["error"]
    assert (error["message"], error["type"], error["code"]) == ("A sentence.", kind, code or "generation_failed")
    (row,) = world.tracer.rows
    assert (row.status, row.finish_reason, row.output_tokens) == (status, "error", 0)


async def test_engine_error_in_the_middle_is_an_event_of_its_kind(world: Any) -> None:
    world.says("The quick brown fox", finish_reason=FinishReason.ERROR, error="Away.", error_code="unavailable")
    reply = await world.http.post("/v1/chat/completions", json=body(stream=True))
    assert reply.status_code == 200
    sent = events(reply.text)
    assert len(sent) > 1
    assert (sent[-1]["error"]["code"], sent[-1]["error"]["type"]) == ("unavailable", "server_error")
    assert (world.tracer.rows[-1].status, world.tracer.rows[-1].finish_reason) == (503, "error")
    assert world.tracer.rows[-1].output_tokens > 0


async def test_trace_row_and_usage(world: Any) -> None:
    reply = await world.http.post(
        "/v1/chat/completions", json=body(priority="offline"), headers={"x-request-id": "abc-1"}
    )
    assert reply.headers["x-request-id"] == "abc-1"
    (row,) = world.tracer.rows
    assert (row.request_id, row.tenant, row.adapter_name, row.adapter_version) == ("abc-1", "acme", "pirate", 2)
    assert (row.status, row.finish_reason, row.priority, row.stream) == (200, "stop", "offline", False)
    assert row.output_tokens == reply.json()["usage"]["completion_tokens"]
    assert row.replica_id == "fake-0"
    assert 0 < row.ttft_s <= row.e2e_s
    assert world.dispatcher.requests[0].deadline_s is None
    await world.gateway.stop()
    (usage,) = world.control.rows_of("report_usage")
    assert (usage.tenant, usage.requests, usage.output_tokens) == ("acme", 1, row.output_tokens)
