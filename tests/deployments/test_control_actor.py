"""The controller's actor, without Ray: what is left of a start that fails."""

from pathlib import Path
from typing import Any

import pytest
from loraplex.config.platform import parse_platform_config
from loraplex.controller.controller import Controller
from loraplex.core.errors import BadConfig, Unavailable
from loraplex_deployments import control_actor

BASE = "{id: tiny, model: 'random:tiny-llama'}"


class _Counted(Controller):
    open = 0

    async def start(self) -> None:
        await super().start()
        _Counted.open += 1

    async def stop(self) -> None:
        await super().stop()
        _Counted.open -= 1

    async def run_fleet(self, *_args: Any, **_kwargs: Any) -> Any:
        raise Unavailable("the control database does not answer")


def actor_of(text: str) -> Any:
    config = parse_platform_config(text, source="test")
    return control_actor.ControllerActor.__ray_metadata__.modified_class(config)


async def test_a_start_that_fails_leaves_no_controller_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gateway asks again and again, and each question is another attempt."""
    monkeypatch.setattr(control_actor, "Controller", _Counted)
    monkeypatch.setattr(control_actor, "base_model_views", lambda config: ({}, ()))
    actor = actor_of(f"{{data_dir: {tmp_path}, base_models: [{BASE}]}}")
    for _ in range(3):
        with pytest.raises(Unavailable, match="does not answer"):
            await actor.call("snapshot", (), {})
    assert _Counted.open == 0
    await actor.leave()


async def test_traces_that_cannot_be_opened_are_told_by_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray tells of a constructor's errors only that the actor died."""
    monkeypatch.setattr(control_actor, "base_model_views", lambda config: ({}, ()))
    actor = actor_of(f"{{data_dir: {tmp_path}, base_models: [{BASE}], traces: {{url: 's3:///x'}}}}")
    for _ in range(2):
        with pytest.raises(BadConfig, match="s3://BUCKET/PREFIX is meant"):
            await actor.start()
    await actor.leave()
