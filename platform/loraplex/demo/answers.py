"""What several models of a running platform answer to the same messages, side by side. Called by notebooks."""

from collections.abc import Sequence

import httpx

from loraplex.core.errors import Unavailable
from loraplex.pages.page import table

_TIMEOUT_S = 120.0


def answers(url: str, key: str, models: Sequence[str], prompts: Sequence[str], *, max_tokens: int) -> list[list[str]]:
    """[prompts][models], greedy, of ``max_tokens`` at most. ``url``: without ``/v1``. Unavailable, with what the
    platform says, when a request is refused."""
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=_TIMEOUT_S) as client:
        return [[_answer(client, model, prompt, max_tokens) for model in models] for prompt in prompts]


def answers_table(url: str, key: str, models: Sequence[str], prompts: Sequence[str], *, max_tokens: int) -> str:
    """The same as HTML: a row for each prompt, a column for each model."""
    found = answers(url, key, models, prompts, max_tokens=max_tokens)
    return table(["", *models], [[prompt, *row] for prompt, row in zip(prompts, found, strict=True)])


def _answer(client: httpx.Client, model: str, prompt: str, max_tokens: int) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    answer = client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        raise Unavailable(f"{model}: {answer.text} (HTTP {answer.status_code})")
    return str(answer.json()["choices"][0]["message"]["content"])
