"""A replica dies in the middle of a stream: the client sees a pause and the same text."""

import psutil
import pytest
from openai import OpenAI

from tests.deployments.conftest import Demo

pytestmark = pytest.mark.ray


def stream(demo: Demo, *, kill_after: int | None = None) -> str:
    client = OpenAI(base_url=f"{demo.http}/v1", api_key=demo.key("acme"), max_retries=0)
    pieces = []
    for chunk in client.completions.create(
        model="pirate",
        prompt="Tell me a long story about whales.",
        max_tokens=80,
        temperature=0.8,
        seed=11,
        stream=True,
        extra_body={"ignore_eos": True},
    ):
        pieces.append(chunk.choices[0].text)
        if kill_after is not None and len(pieces) == kill_after:
            assert kill_replicas() == 1
    return "".join(pieces)


def kill_replicas() -> int:
    """Those of the Ray that this process started; ``loraplex serve`` of other tests runs under a child of its own."""
    mine = [
        worker
        for child in psutil.Process().children()
        if child.name() == "raylet"
        for worker in child.children()
        if any("ReplicaActor" in word for word in worker.cmdline())
    ]
    for process in mine:
        process.kill()
    return len(mine)


def test_the_stream_goes_on_with_the_same_text(demo: Demo) -> None:
    assert stream(demo, kill_after=15) == stream(demo)
