"""Which groups are freed while replicas start, without Ray."""

from pathlib import Path

import pytest
from loraplex.config.platform import parse_platform_config
from loraplex.core.control import AdapterView
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import Shape
from loraplex_deployments import actuator
from loraplex_deployments.replica_handles import ReplicaName


async def no_adapters() -> tuple[AdapterView, ...]:
    return ()


def name_in(group: str) -> ReplicaName:
    return ReplicaName(ReplicaId(f"of-{group}"), group, BaseModelId("b"), Shape(), "")


async def test_the_group_of_a_replica_that_is_just_being_started_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_platform_config(
        f"{{data_dir: {tmp_path}, base_models: [{{id: b, model: 'random:tiny-llama'}}]}}", source="test"
    )
    machines = actuator.RayActuator(config, cluster_secret="secret", adapters=no_adapters)
    machines._pending.add(name_in("started"))
    released: list[str] = []

    def names() -> tuple[ReplicaName, ...]:
        """Read an instant before one replica got its actor and another began to wait."""
        machines._pending.discard(name_in("started"))
        machines._pending.add(name_in("taken"))
        return (name_in("running"),)

    groups = dict.fromkeys(("abandoned", "running", "started", "taken"), ("node",))
    monkeypatch.setattr(actuator, "reserved_groups", lambda: dict(groups))
    monkeypatch.setattr(actuator, "replica_names", names)
    monkeypatch.setattr(actuator, "release", released.append)
    kept = await machines._release_abandoned()
    assert released == ["abandoned"]
    assert set(kept) == {"running", "started", "taken"}
