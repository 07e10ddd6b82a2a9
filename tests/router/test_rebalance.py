"""Requests that are on a replica already go to another one where they would end much sooner, once, and lose nothing."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.core.ids import ReplicaId
from loraplex.core.wire import LoadReport, ReplicaFrame, ReplicaInfo
from loraplex.engine import EngineConfig
from loraplex.router.config import RouterConfig
from loraplex.router.policy import Demand, ReplicaView, choose_replica
from loraplex.router.prediction import Rates
from loraplex.router.rebalance import INTERVAL_S, saved_s

from tests.router.replicas import check, eventually, make_request, start_replica, start_router
from tests.router.scripted import BASE, ScriptedReplica, World, make, route

RATES = Rates(step_s=0.05, token_s=1e-4, max_step_tokens=512, max_running=2)
"""Two requests compute at a time; those beyond wait."""


def view(name: str, *, rows: int, rates: Rates = RATES) -> ReplicaView:
    return ReplicaView(replica_id=ReplicaId(name), rates=rates, credits=8, rows=rows, prompt_tokens=100.0 * rows)


rows = st.integers(0, 40)
any_rates = st.builds(
    Rates,
    step_s=st.floats(0.001, 0.1),
    row_s=st.floats(0, 0.01),
    token_s=st.floats(1e-6, 1e-3),
    max_running=st.integers(1, 32),
)


@given(rows, rows, any_rates, st.integers(1, 2000), st.integers(1, 2000), st.booleans())
def test_among_replicas_of_a_kind_nothing_goes_to_one_that_has_as_much(
    here: int, there: int, rates: Rates, prompt: int, left: int, waits: bool
) -> None:
    demand = Demand(key=1, prompt_tokens=prompt, output_tokens=float(left))
    views = view("here", rows=here + 1, rates=rates), view("there", rows=there, rates=rates)
    choice = choose_replica(views[1:], demand, RouterConfig())
    assert choice is not None
    saved = saved_s(views[0], choice, demand, tokens_left=left, waits=waits)
    assert saved >= 0
    if there > here:
        assert saved == 0


def test_what_waits_saves_its_turn_what_runs_only_slow_steps() -> None:
    demand = Demand(key=1, prompt_tokens=100, output_tokens=100)
    choice = choose_replica([view("there", rows=0)], demand, RouterConfig())
    assert choice is not None
    # Five seconds of its own; until its turn, a place every two and a half seconds.
    assert saved_s(view("here", rows=4), choice, demand, tokens_left=100, waits=True) == pytest.approx(5, abs=0.2)
    assert saved_s(view("here", rows=4), choice, demand, tokens_left=100, waits=False) == 0
    slow = Rates(step_s=0.2, token_s=1e-4, max_step_tokens=512, max_running=8)
    here = view("here", rows=4, rates=slow)
    assert saved_s(here, choice, demand, tokens_left=100, waits=False) == pytest.approx(15, abs=0.2)
    assert saved_s(here, choice, demand, tokens_left=0.5, waits=False) == 0


def up(replica: ScriptedReplica, *, running: int = 0, waiting: int = 0, steps: int = 100) -> None:
    """It computes two at a time, in steps of 50 ms."""
    info = ReplicaInfo(
        replica_id=replica.route.replica_id,
        base_model_id=BASE,
        max_context_tokens=1000,
        num_pages=1000,
        page_size=4,
        max_running=2,
        max_step_tokens=512,
    )
    load = LoadReport(
        credits=10, num_running=running, num_waiting=waiting, num_free_pages=1000, steps=steps, busy_s=steps * 0.05
    )
    replica.listener.on_frame(ReplicaFrame(replica=info, load=load))


async def test_the_last_of_those_that_wait_go_to_a_replica_that_comes() -> None:
    world = World("a")
    old = world.replicas["a"]
    up(old, steps=0)
    up(old)
    streams = {name: world.router.dispatch((make(name),)) for name in ("w", "x", "y", "z")}
    old.answer("w", "x", tokens=(0,))
    up(old, running=2, waiting=2, steps=200)
    world.router.update((route("a"), route("b")), "secret")
    new = world.replicas["b"]
    up(new)
    assert old.aborted == ["z"]
    assert list(new.submitted) == ["z~1"]
    up(old, running=2, waiting=1, steps=300)
    assert old.aborted == ["z"], "one at a look"
    await asyncio.sleep(INTERVAL_S)
    up(old, running=2, waiting=1, steps=400)
    assert old.aborted == ["z", "y"]
    await asyncio.sleep(INTERVAL_S)
    up(new, running=2, steps=200)
    up(old, running=2, steps=500)
    assert old.aborted == ["z", "y"], "those that run end no sooner there"
    world.router.validate()
    for wire_id in new.submitted:
        new.answer(wire_id, tokens=(7,), end=True)
    assert [token.token_id for token in (await streams["z"].next_outputs())[0].tokens] == [7]
    await world.router.close()


@pytest.mark.parametrize("config", [{"rebalance_min_gain_s": None}, {"policy": "least-loaded"}, {}])
async def test_nothing_moves_without_leave_or_while_somebody_waits_for_a_place(config: dict[str, object]) -> None:
    world = World("a", **config)  # type: ignore[arg-type]
    old = world.replicas["a"]
    up(old, steps=0)
    up(old)
    for name in ("w", "x", "y", "z"):
        world.router.dispatch((make(name),))
    old.answer("w", "x", tokens=(0,))
    if not config:
        old.report(credits=0)
        world.router.dispatch((make("queued"),))
    world.router.update((route("a"), route("b")), "secret")
    await asyncio.sleep(INTERVAL_S)
    load = LoadReport(credits=1 if config else 0, num_running=2, num_waiting=2, steps=200, busy_s=10.0)
    old.listener.on_frame(ReplicaFrame(load=load))
    if config:
        up(world.replicas["b"])
    assert old.aborted == []
    await world.router.close()


async def test_a_new_replica_takes_what_waits_and_every_text_is_the_same(stack: AsyncExitStack) -> None:
    """Real engines; one replica computes two requests at a time, then there are two such."""
    first, second = [
        await start_replica(stack, f"replica-{i}", step_s=0.01, engine=EngineConfig(max_running=2)) for i in range(2)
    ]
    router = start_router(stack, first, rebalance_min_gain_s=0.2)
    requests = [make_request(max_tokens=80, adapter=adapter) for adapter in (None, "a" * 64, "b" * 64) for _ in "ab"]
    runs = [asyncio.create_task(check(router, request)) for request in requests]
    await eventually(lambda: first.loop.num_unfinished > 3 and router.loads()["replica-0"].generated_tokens > 20)
    router.update((first.route, second.route), "s" * 16)
    await eventually(lambda: second.loop.num_unfinished > 1)
    await asyncio.gather(*runs)
    router.validate()
