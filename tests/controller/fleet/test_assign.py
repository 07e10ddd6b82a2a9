"""The fast loop's decision: adapters move to where there is room, none is lost, and even loads are left alone."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from loraplex.controller.fleet.assign import reassigned
from loraplex.core.plan import Plan

from tests.controller.fleet.world import A, B, group, plan

NAMES = "pqrstu"


def _load_of(made: Plan, rates: dict[str, float]) -> list[float]:
    """Requests per second of each group of base a, weights being equal."""
    homes = {name: [g for g in made.groups if _has(g, name)] for name in rates}
    return [sum(rate / len(homes[name]) for name, rate in rates.items() if one in homes[name]) for one in made.groups]


def _has(one: object, name: str) -> bool:
    return any(share.name == name for placed in one.bases for share in placed.adapters)  # type: ignore[attr-defined]


def _rates(rates: dict[str, float]) -> dict[tuple[str, str | None, str], float]:
    return {(A, "acme", name): rate for name, rate in rates.items()}


def test_a_flash_crowd_spreads_and_comes_home_when_it_is_over() -> None:
    planned = plan(1, group("x", A, adapters="p"), group("y", A, adapters="q"), group("z", B, adapters="r"))
    hot, lines = reassigned(planned, planned, _rates({"p": 20.0, "q": 1.0}))
    assert len(lines) == 1
    assert "acme/p spreads from x to y" in lines[0]
    assert _has(hot.groups[0], "p")
    assert _has(hot.groups[1], "p")
    assert hot.groups[2] == planned.groups[2]
    calm, lines = reassigned(planned, hot, _rates({"p": 0.01, "q": 1.0, "elsewhere": 8.0}))
    assert any("is cold" in line for line in lines)
    assert calm == planned


def test_a_replica_with_several_busy_adapters_gives_one_away() -> None:
    planned = plan(1, group("x", A, adapters="pqr"), group("y", A, adapters="s"))
    made, lines = reassigned(planned, planned, _rates(dict.fromkeys("pqr", 2.0) | {"s": 1.0}))
    assert len(lines) == 1
    assert "moves from x to y" in lines[0]
    assert max(_load_of(made, dict.fromkeys("pqr", 2.0) | {"s": 1.0})) == 4.0


def test_where_every_replica_takes_every_adapter_nothing_moves() -> None:
    planned = plan(1, group("x", A), group("y", A))
    assert reassigned(planned, planned, _rates({"p": 50.0})) == (planned, ())


@settings(max_examples=200, deadline=None)
@example([[], ["p"]], {"p": 5e-324})
@given(
    st.lists(st.lists(st.sampled_from(NAMES), unique=True), min_size=2, max_size=4),
    st.dictionaries(st.sampled_from(NAMES), st.floats(0.0, 100.0)),
)
def test_the_fullest_replica_gets_no_fuller_and_no_adapter_is_lost(
    sets: list[list[str]], rates: dict[str, float]
) -> None:
    planned = plan(1, *(group(f"g{index}", A, adapters=names) for index, names in enumerate(sets)))
    listed = {name: rate for name, rate in rates.items() if any(name in names for names in sets)}
    now, before = planned, max(_load_of(planned, listed), default=0.0)
    for _ in range(30):
        made, lines = reassigned(planned, now, _rates(rates))
        for name in listed:
            assert any(_has(one, name) for one in made.groups)
        if not lines:
            break
        now = made
    else:
        raise AssertionError(f"it never comes to rest: {lines}")
    assert max(_load_of(now, listed), default=0.0) <= before * 1.1 + 1e-6
