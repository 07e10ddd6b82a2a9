"""POST /v1/completions over the ASGI transport."""

import json
from typing import Any

import pytest


async def post(world: Any, **fields: Any) -> Any:
    return await world.http.post("/v1/completions", json={"model": "tiny-base", "prompt": "Hi", **fields})


async def test_text_prompt(world: Any) -> None:
    reply = await post(world)
    assert reply.status_code == 200, reply.text
    data = reply.json()
    assert data["object"] == "text_completion"
    assert data["choices"][0]["text"] == "Hello there."
    assert world.dispatcher.requests[0].sampling.max_tokens == 16
    assert world.dispatcher.requests[0].adapter is None


async def test_all_prompt_forms_give_the_same_tokens(world: Any) -> None:
    ids = list(world.codec.encode("Hi"))
    for prompt in ("Hi", ["Hi"], ids, [ids]):
        assert (await post(world, prompt=prompt)).status_code == 200
    assert {request.prompt_token_ids for request in world.dispatcher.requests} == {tuple(ids)}


async def test_several_prompts_and_choices_are_neighbours(world: Any) -> None:
    reply = await post(world, prompt=["one", "two"], n=2, echo=True)
    texts = [choice["text"] for choice in reply.json()["choices"]]
    assert texts == ["oneHello there.", "oneHello there.", "twoHello there.", "twoHello there."]
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2, 3]
    prompts = [world.codec.encode(text) for text in ("one", "two")]
    assert reply.json()["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_a_seeded_prompt_has_the_same_seeds_alone_and_beside_others(world: Any) -> None:
    await post(world, prompt="two", seed=7, n=2)
    await post(world, prompt=["one", "two"], seed=7, n=2)
    assert [request.sampling.seed for request in world.dispatcher.requests] == [7, 8, 7, 8, 7, 8]


async def test_without_a_seed_equal_prompts_differ(world: Any) -> None:
    await post(world, prompt=["one", "one"], n=2)
    assert len({request.sampling.seed for request in world.dispatcher.requests}) == 4


async def test_no_stop_string_counts_before_min_tokens(world: Any) -> None:
    ids = world.codec.backend.encode("Hello there.").ids
    reply = await post(world, stop=["l", "."], min_tokens=len(ids))
    assert reply.json()["choices"][0]["text"] == "Hello there"
    assert reply.json()["usage"]["completion_tokens"] == len(ids)


async def test_the_row_of_several_choices_with_stop_strings_names_a_replica(world: Any) -> None:
    await post(world, n=2, stop=["there"])
    assert world.tracer.rows[-1].replica_id == "fake-0"


async def test_echo_in_a_stream_comes_once(world: Any) -> None:
    reply = await post(world, prompt="one ", echo=True, stream=True)
    events = [json.loads(line[6:]) for line in reply.text.split("\n\n")[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == "one Hello there."


async def test_logprobs_shape(world: Any) -> None:
    reply = await post(world, logprobs=2)
    logprobs = reply.json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "Hello there."
    assert logprobs["token_logprobs"] == [-0.5] * len(logprobs["tokens"])
    assert logprobs["text_offset"][0] == 0
    assert len(logprobs["top_logprobs"]) == len(logprobs["tokens"])


async def test_stop_token_is_counted_but_silent(world: Any) -> None:
    last = world.codec.backend.encode("Hello there.").ids[-1]
    reply = await post(world, stop_token_ids=[last])
    ids = world.codec.backend.encode("Hello there.").ids
    assert reply.json()["choices"][0]["text"] == world.codec.decode(ids[:-1])
    assert reply.json()["usage"]["completion_tokens"] == len(ids)


async def test_sampling_fields_reach_the_engine(world: Any) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "max_tokens": 5,
        "logit_bias": {"12": -100, "5": 3.5},
    }
    assert (await post(world, **fields)).status_code == 200
    sampling = world.dispatcher.requests[0].sampling
    assert sampling.logit_bias == ((5, 3.5), (12, -100.0))
    assert all(getattr(sampling, name) == value for name, value in fields.items() if name != "logit_bias")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "word " * 400}, "prompt"),
        ({"n": 1000}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "x"}}, "logit_bias"),
        ({"logit_bias": {str(token_id): "x" for token_id in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": [999999]}, "stop_token_ids"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"guided_json": {}}, "guided_json"),
        ({"priority": "urgent"}, "priority"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
    ],
)
async def test_bad_fields_are_named(world: Any, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny-base", "prompt": "Hi", **fields}
    reply = await world.http.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert str(error["param"]).split(".")[0] == param
    assert error["type"] == "invalid_request_error"
    assert not world.dispatcher.requests


async def test_neutral_values_of_unsupported_fields_are_accepted(world: Any) -> None:
    fields: dict[str, Any] = {
        "suffix": None,
        "tools": [],
        "response_format": {"type": "text"},
        "user": "u",
        "store": True,
        "metadata": {},
    }
    assert (await post(world, **fields)).status_code == 200


async def test_long_prompts_are_tokenized_off_the_loop_with_the_same_result(world: Any) -> None:
    object.__setattr__(world.gateway._view.snapshot.base_models[0], "max_context_tokens", 100_000)
    text = "The quick brown fox. " * 500
    assert (await post(world, prompt=text)).status_code == 200
    assert world.dispatcher.requests[0].prompt_token_ids == world.codec.encode(text)
