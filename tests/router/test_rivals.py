"""Routing policies of others."""

import dataclasses

from loraplex.core.ids import Digest, ReplicaId
from loraplex.router.config import RouterConfig
from loraplex.router.policy import Demand, ReplicaView, choose_replica
from loraplex.router.prediction import Rates
from loraplex.router.rivals import PowerOfTwoMultiplexed, consistent_hash, least_loaded, routing_policy

CONFIG = RouterConfig()
ADAPTER = Digest("x")


def view(name: str, *, rows: int = 0, credits: int = 9, resident: tuple[str, ...] = ()) -> ReplicaView:
    return ReplicaView(
        replica_id=ReplicaId(name),
        rates=Rates(step_s=0.01),
        rows=rows,
        credits=credits,
        resident=frozenset(map(Digest, resident)),
    )


def demand(key: int = 0) -> Demand:
    return Demand(key=key, prompt_tokens=10, output_tokens=10.0, digest=ADAPTER)


def test_each_chooses_as_its_name_says() -> None:
    a, b, c = view("a", rows=5, resident=("x",)), view("b", rows=1), view("c", rows=2, resident=("y", "z"))
    chosen = least_loaded((a, b, c), demand(), CONFIG)
    assert chosen is not None
    assert chosen.view is b
    homes = {consistent_hash((a, b, c), demand(key), CONFIG).view.replica_id for key in range(50)}  # type: ignore[union-attr]
    assert homes == {"a", "b", "c"}
    multiplexed = PowerOfTwoMultiplexed()
    for _ in range(20):
        found = multiplexed((a, b, c), demand(), CONFIG)
        assert found is not None
        assert found.view is a
    full = dataclasses.replace(a, credits=0)
    for views in ((full, b, c), (b, c)):
        fewest = multiplexed(views, demand(), CONFIG)
        assert fewest is not None
        assert fewest.view is b
    nobody = tuple(dataclasses.replace(each, credits=0) for each in (a, b, c))
    assert multiplexed(nobody, demand(), CONFIG) is None
    assert multiplexed((), demand(), CONFIG) is None


def test_the_config_names_them() -> None:
    assert routing_policy(RouterConfig()) is choose_replica
    assert routing_policy(RouterConfig(policy="least-loaded")) is least_loaded
    assert routing_policy(RouterConfig(policy="consistent-hash")) is consistent_hash
    one, other = (routing_policy(RouterConfig(policy="pow2-multiplexed")) for _ in range(2))
    assert isinstance(one, PowerOfTwoMultiplexed)
    assert one is not other
