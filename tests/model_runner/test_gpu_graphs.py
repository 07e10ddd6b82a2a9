"""Which graph a step runs as. Captures are stand-ins: no device is needed."""

from collections.abc import Callable, Hashable

import pytest
import torch
from loraplex.model_runner.gpu.graphs import GraphCache

Ran = list[tuple[str, Hashable]]


class Replay:
    def __init__(self, ran: Ran, key: Hashable) -> None:
        self._ran, self._key = ran, key

    def replay(self) -> None:
        self._ran.append(("replayed", self._key))


class NotedCaptures(GraphCache):
    """Notes how steps ran."""

    def __init__(self, patience: int) -> None:
        super().__init__(torch.device("cuda"), enabled=True, patience=patience)
        self.ran: Ran = []

    def capture(self, key: Hashable, body: Callable[[], torch.Tensor]) -> None:
        self.ran.append(("captured", key))
        self._graphs[key] = (Replay(self.ran, key), torch.empty(0))  # type: ignore[assignment]

    def take(self, key: str, wider: str = "") -> Ran:
        """What the step of ``key`` led to."""
        self.ran.clear()

        def body() -> torch.Tensor:
            self.ran.append(("eager", key))
            return torch.empty(0)

        self.run(key, body, lambda: wider)
        return list(self.ran)


def test_a_step_without_a_wider_graph_is_captured_when_it_comes_again() -> None:
    cache = NotedCaptures(patience=3)
    assert cache.take("a", "bc") == [("eager", "a")]
    assert cache.take("a", "bc") == [("captured", "a"), ("replayed", "a")]
    assert cache.take("a", "bc") == [("replayed", "a")]
    assert cache.num_captured == 1


def test_the_closest_wider_graph_serves_until_a_step_has_come_often() -> None:
    cache = NotedCaptures(patience=3)
    for key in "cd":
        cache.capture(key, torch.Tensor)
    for _ in range(3):
        assert cache.take("a", "bcd") == [("replayed", "c")]
    assert cache.take("a", "bcd") == [("eager", "a")]
    assert cache.take("a", "bcd") == [("captured", "a"), ("replayed", "a")]
    assert cache.take("b", "d") == [("replayed", "d")]


def test_without_patience_a_step_has_its_own_graph_at_once() -> None:
    cache = NotedCaptures(patience=0)
    cache.capture("b", torch.Tensor)
    assert cache.take("a", "b") == [("eager", "a")]
    assert cache.take("a", "b") == [("captured", "a"), ("replayed", "a")]


def test_without_graphs_all_steps_are_eager() -> None:
    cache = GraphCache(torch.device("cpu"), enabled=True, patience=3)
    ones = torch.ones(1)
    for _ in range(3):
        assert cache.run("a", lambda: ones, lambda: pytest.fail("nobody has a graph")) is ones
    assert cache.num_captured == 0
