"""Bodies of the generation routes whose elements are all wrong cost no more than their first."""

from typing import Any

import pytest
from loraplex.core.errors import InvalidInput
from loraplex.gateway.routes.requests import ChatCompletionRequest, CompletionRequest
from pydantic import ValidationError

MANY = 2000


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [-1] * MANY},
        {"prompt": [1, *["x"] * MANY]},
        {"prompt": [[-1]] * MANY},
        {"prompt": [[-1] * MANY]},
        {"stop": [1] * MANY},
        {"stop_token_ids": [-1] * MANY},
    ],
)
def test_a_list_fails_at_its_first_wrong_element(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": "Hi", **fields})
    assert caught.value.error_count() <= 4


@pytest.mark.parametrize(
    "messages",
    [
        [0] * MANY,
        [{"role": "nobody"}] * MANY,
        [{"role": "user", "content": [0] * MANY}],
        [{"role": "user", "content": [{"type": "image", "text": 1}] * MANY}] * MANY,
    ],
)
def test_messages_fail_at_the_first_wrong_one(messages: list[Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"model": "m", "messages": messages})
    assert caught.value.error_count() <= 4


def test_the_size_of_logit_bias_is_checked_before_its_entries() -> None:
    body = {"model": "m", "prompt": "Hi", "logit_bias": {str(token_id): "x" for token_id in range(MANY)}}
    with pytest.raises(InvalidInput, match="At most 1024 entries"):
        CompletionRequest.model_validate(body)
