"""A replica that reads an artifact while the controller is replaced, restarted or gone, without Ray."""

from collections.abc import Callable
from typing import Any

import pytest
from loraplex.core.control_wire import encode_answer
from loraplex.core.errors import LoraplexError, NotFound, Unavailable
from loraplex.core.ids import Digest
from loraplex_deployments import control_client
from loraplex_deployments.control_client import RayArtifactReader
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

DIGEST = Digest("a" * 64)


class Handle:
    """Of an actor: each call takes the next outcome, the last one for ever."""

    def __init__(self, *outcomes: Exception | bytes) -> None:
        self._outcomes = list(outcomes)
        self.count = 0
        self.ask = self

    def remote(self, request: bytes) -> Callable[[], bytes]:
        self.count += 1
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]

        def get() -> bytes:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return get


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client.ray, "get", lambda asked, timeout: asked())
    monkeypatch.setattr(control_client, "_AWAY_PAUSE_S", 0.01)


def piece(content: bytes) -> bytes:
    return encode_answer(content)


def read(handle: Handle) -> bytes:
    return RayArtifactReader(handle).read(DIGEST, offset=0, max_bytes=10)


def test_a_controller_that_was_replaced_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    successor = Handle(piece(b"weights"))
    found: list[Any] = [Unavailable("not yet"), Unavailable("not yet"), successor]

    def by_name() -> Any:
        one = found.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    monkeypatch.setattr(control_client, "controller_handle", by_name)
    old = Handle(ActorDiedError())
    assert read(old) == b"weights"
    assert (old.count, successor.count) == (3, 1)


def test_a_controller_that_restarts_is_waited_for() -> None:
    restarting = ActorUnavailableError("it restarts", None)
    assert read(Handle(restarting, restarting, piece(b"weights"))) == b"weights"


def test_one_that_stays_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_client, "_AWAY_S", 0.05)
    with pytest.raises(Unavailable, match="the controller is away"):
        read(Handle(ActorUnavailableError("it restarts", None)))


@pytest.mark.parametrize("error", [NotFound("deleted", code="artifact_not_found"), Unavailable("no database")])
def test_what_the_controller_says_itself_is_raised_at_once(error: LoraplexError) -> None:
    handle = Handle(RayTaskError("ask", "", error))
    with pytest.raises(type(error), match=error.message):
        read(handle)
    assert handle.count == 1
