"""The fast simulator: near the exact one, the same policy, nothing lost."""

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.core.ids import Digest
from loraplex.core.plan import Shape
from loraplex.cost.loads import Tier
from loraplex.engine import EngineConfig
from loraplex.router.config import RouterConfig
from loraplex.router.policy import Demand, ReplicaView, affinity, choose_replica, hash64, rendezvous
from loraplex.simulator import fast
from loraplex.simulator.cluster import Cluster, rates_of
from loraplex.simulator.compare import compare
from loraplex.simulator.compiled import compiled
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.fast_router import choose, uniform
from loraplex.simulator.fast_runs import run_s
from loraplex.simulator.fast_state import NONE, REPORTED, SENT, Knobs, State, knobs_of, state_of
from loraplex.simulator.scenarios import SCENARIOS, make_arrivals, make_input, with_adapter_sets
from loraplex.simulator.types import Outcome, SimulationInput, SimulationResult
from loraplex.simulator.workload import Workload


@compiled
def _choose(state: State, knobs: Knobs, r: int) -> int:
    return choose(state, knobs, r)


@compiled
def _uniform(r: int, p: int) -> float:
    return uniform(r, p)


@compiled
def _run_s(first_s: float, slope_s: float, count: int) -> float:
    return run_s(first_s, slope_s, count)


@pytest.mark.parametrize("name", ["steady", "one-step-in-flight", "short-of-kv", "shared-pipeline"])
def test_it_is_near_the_exact_simulator(name: str) -> None:
    found = compare(SCENARIOS[name], seeds=(0,))
    assert found.is_near, found


def test_one_replica_gives_every_request_the_times_of_the_exact_simulator() -> None:
    arrivals = make_arrivals(num_requests=300, rate=12, num_adapters=10)
    for max_in_flight in (1, 2):
        given_ = dataclasses.replace(make_input(arrivals, num_groups=1), max_in_flight=max_in_flight)
        ours, theirs = fast.simulate(given_), simulate_exact(given_)
        assert np.allclose(ours.ttft_s, theirs.ttft_s, rtol=1e-9)
        assert np.allclose(ours.tpot_s, theirs.tpot_s, rtol=1e-9)
        for one, other in zip(ours.groups, theirs.groups, strict=True):
            assert one.busy_s == pytest.approx(other.busy_s, rel=1e-9)
            assert dataclasses.replace(one, busy_s=0.0) == dataclasses.replace(other, busy_s=0.0)
        assert ours.score.num_good == theirs.score.num_good


def _together(seed: int, *, output: float, router: RouterConfig) -> SimulationInput:
    """Bursts of requests with equal lengths: many of them end in the same step."""
    arrivals = make_arrivals(seed=seed, num_requests=400, rate=400, cv=4, num_adapters=20, output=output, spread=0.0)
    engine = EngineConfig(max_running=32, max_waiting=8, max_step_tokens=1000)
    return dataclasses.replace(make_input(arrivals, num_groups=2, engine=engine), router=router)


@pytest.mark.parametrize(
    "given_",
    [
        SCENARIOS["refusals"](1),
        SCENARIOS["refusals"](6),
        _together(0, output=1.0, router=RouterConfig(max_queued_requests=40)),
        _together(1, output=9.0, router=RouterConfig(max_queue_wait_s=0.5)),
    ],
    ids=["refusals-1", "refusals-6", "one-token", "nine-tokens"],
)
def test_where_tenants_wait_and_are_refused_every_request_goes_as_in_the_exact_simulator(
    given_: SimulationInput,
) -> None:
    """One turn that differs tips the rest: who pays when, who is lifted to what, whose row and wait come first."""
    assert (_same_course(given_).outcome == Outcome.REFUSED).sum() > 50


@pytest.mark.parametrize("name", ["two-bases", "pipeline"])
def test_turns_and_stages_are_as_in_the_exact_simulator(name: str) -> None:
    _same_course(SCENARIOS[name](0))


def test_a_pipeline_that_runs_empty_waits_for_the_host_in_both_simulators() -> None:
    given_ = SCENARIOS["pipeline"](0)
    slower = _same_course(_with_alone(given_, 2e-3))
    assert slower.ttft_s[0] > simulate_exact(given_).ttft_s[0] + 1e-3


def test_bases_that_share_a_pipeline_wait_for_the_host_at_each_turn_in_both_simulators() -> None:
    """And for no less than a turn takes anyway."""
    given_ = dataclasses.replace(SCENARIOS["shared-pipeline"](0), turn_s=1e-3)
    times = {
        alone_s: [simulate(_with_alone(given_, alone_s)).ttft_s.mean() for simulate in (fast.simulate, simulate_exact)]
        for alone_s in (0.0, 1e-3, 3e-3)
    }
    for ours, theirs in times.values():
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert times[0.0][1] < times[1e-3][1] < times[3e-3][1] - 3e-3


def test_one_request_alone_waits_for_the_host_at_each_token() -> None:
    arrivals = make_arrivals(num_requests=1, rate=1, num_adapters=1)
    arrivals = dataclasses.replace(arrivals, adapter=np.full(1, -1, dtype=np.int32))
    for stages, alone_s in ((1, 0.0), (2, 1e-3)):
        given_ = make_input(arrivals, num_groups=1, shape=Shape(pp=stages))
        before, after = simulate_exact(given_), _same_course(_with_alone(given_, 1e-3))
        assert after.ttft_s - before.ttft_s == pytest.approx(alone_s, abs=1e-9)
        assert after.tpot_s - before.tpot_s == pytest.approx(alone_s, abs=1e-9)


def _with_alone(given_: SimulationInput, alone_s: float) -> SimulationInput:
    costs = {
        key: dataclasses.replace(cost, step=msgspec.structs.replace(cost.step, alone_s=alone_s))
        for key, cost in given_.costs.items()
    }
    return dataclasses.replace(given_, costs=costs)


def _same_course(given_: SimulationInput) -> SimulationResult:
    """Every request has the same outcome, place and times in both; those of the exact one."""
    ours, theirs = fast.simulate(given_), simulate_exact(given_)
    assert np.array_equal(ours.outcome, theirs.outcome)
    assert np.array_equal(ours.group, theirs.group)
    assert np.allclose(ours.ttft_s, theirs.ttft_s, rtol=1e-9)
    assert np.allclose(ours.tpot_s, theirs.tpot_s, rtol=1e-9)
    return theirs


def _policy_case(seed: int, num_groups: int, *, plain: bool) -> tuple[SimulationInput, State, Knobs, Cluster, Workload]:
    random = np.random.default_rng(seed)
    arrivals = make_arrivals(num_requests=1, rate=1, num_adapters=4, seed=seed)
    if plain:
        arrivals = dataclasses.replace(arrivals, adapter=np.full(1, -1, dtype=np.int32))
    engine = EngineConfig(max_running=6, max_waiting=2)
    given_ = make_input(arrivals, num_groups=num_groups, engine=engine)
    if num_groups > 2 and seed % 2:
        given_ = with_adapter_sets(given_, num_replicas=2)
    workload = Workload.of(given_.arrivals, given_.adapters)
    cluster = Cluster.of(given_, workload)
    knobs = knobs_of(given_, cluster)
    state = state_of(given_, workload, cluster, knobs)
    state.load[:] = random.integers(0, 10, size=num_groups)
    state.pairs["sent"] = random.integers(1, 9, size=state.seen.shape) * (random.random(state.seen.shape) < 0.2)
    state.seen[:] = REPORTED * (random.random(state.seen.shape) < 0.5) + SENT * (state.pairs["sent"] > 0)
    state.views["queued"] = random.integers(0, 4, size=num_groups) * 700
    state.views["prompts"] = 300 * state.load
    state.views["room"] = random.choice([500.0, 1e6], size=num_groups)
    return given_, state, knobs, cluster, workload


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_the_choice_is_the_routing_policys(seed: int, num_groups: int, plain: bool) -> None:
    given_, state, knobs, cluster, workload = _policy_case(seed, num_groups, plain=plain)
    key = int(cluster.request_key[0])
    adapter = int(workload.arrivals.adapter[0])
    first, end = cluster.first_candidate[key : key + 2]
    candidates = cluster.candidates[first:end].tolist()
    digest = Digest(workload.adapter_keys[adapter]) if adapter >= 0 else None
    views = []
    for p in candidates:
        replica, known = cluster.replicas[p], cluster.tables[p]
        num_sent = int(state.pairs["sent"][adapter, p])
        views.append(
            ReplicaView(
                replica_id=replica.replica_id,
                rates=rates_of(given_, replica),
                rows=int(state.load[p]),
                queued_tokens=float(state.views["queued"][p]),
                prompt_tokens=float(state.views["prompts"][p]),
                room_tokens=float(state.views["room"][p]),
                credits=knobs.max_unfinished - int(state.load[p]),
                resident={digest} if digest is not None and state.seen[adapter, p] & REPORTED else (),
                absence_s=lambda digest, table=known: float(table.load_s[workload.adapter_size[adapter]]),  # type: ignore[misc]
                sent={digest: num_sent} if digest is not None and num_sent else {},
            )
        )
    demand = Demand(
        key=0 if digest is None or cluster.is_listed[key] else hash64(digest.encode()),
        prompt_tokens=int(workload.arrivals.prompt_tokens[0]),
        output_tokens=float(state.mean_output[0]),
        digest=digest,
        weights={v.replica_id: float(w) for v, w in zip(views, cluster.weights[first:end], strict=True)},
    )
    expected = choose_replica(views, demand, given_.router)
    chosen = _choose(state, knobs, 0)
    if expected is None:
        assert chosen == NONE
    else:
        assert cluster.replicas[chosen].replica_id == expected.view.replica_id


def test_homes_of_cold_adapters_are_the_routers_affinities_times_weights() -> None:
    given_ = with_adapter_sets(
        make_input(make_arrivals(num_requests=9, rate=1, num_adapters=5), num_groups=3), num_replicas=2
    )
    workload = Workload.of(given_.arrivals, given_.adapters)
    cluster = Cluster.of(given_, workload)
    state = state_of(given_, workload, cluster, knobs_of(given_, cluster))
    for adapter, key in enumerate(workload.adapter_keys):
        first, end = cluster.first_candidate[adapter : adapter + 2]
        for candidate in state.candidates[first:end]:
            replica = cluster.replicas[int(candidate["replica"])]
            expected = affinity(key.encode(), replica.replica_id, float(candidate["weight"]))
            assert candidate["home"] == pytest.approx(expected, rel=1e-12)
        assert sorted(cluster.weights[first:end]) == [1.0, 2.0]


@settings(deadline=None)
@given(st.integers(0, 1 << 40), st.integers(0, (1 << 64) - 1))
def test_hashes_are_the_routing_policys(r: int, replica_key: int) -> None:
    drawn = _uniform(r, np.uint64(replica_key))
    assert 0.0 < drawn < 1.0
    assert rendezvous(r, replica_key) == pytest.approx(1.0 / -np.log(drawn), rel=1e-12)


def test_hashes_of_prompts_are_spread_evenly() -> None:
    keys = [np.uint64(hash64(b"replica-%d" % p)) for p in range(8)]
    drawn = np.array([_uniform(r, key) for r in range(500) for key in keys])
    assert np.abs(np.histogram(drawn, bins=10, range=(0, 1))[0] / len(drawn) - 0.1).max() < 0.02
    wins = np.bincount(drawn.reshape(500, 8).argmax(axis=1), minlength=8) / 500
    assert np.abs(wins - 1 / 8).max() < 0.05


@settings(deadline=None)
@given(st.floats(1e-4, 1.0), st.floats(0.0, 1e-2), st.integers(1, 400))
def test_a_run_of_steps_takes_the_sum_of_its_steps(first_s: float, slope_s: float, count: int) -> None:
    steps_s = [first_s + slope_s * index for index in range(count)]
    assert _run_s(first_s, slope_s, count) == pytest.approx(sum(steps_s), rel=1e-9)


def _with_pages(given_: SimulationInput, num_pages: int | None) -> SimulationInput:
    if num_pages is None:
        return given_
    costs = {}
    for key, cost in given_.costs.items():
        memory = cost.memory
        gpu_bytes = memory.weight_bytes + memory.activation_bytes + num_pages * memory.page_bytes
        costs[key] = dataclasses.replace(cost, memory=msgspec.structs.replace(memory, gpu_bytes=gpu_bytes))
    return dataclasses.replace(given_, costs=costs)


inputs = st.builds(
    lambda seed, rate, adapters, groups, cv, sets, engine, in_flight, tier, output, router, shape, pages: (
        dataclasses.replace(
            (lambda g: _with_pages(with_adapter_sets(g, num_replicas=min(2, groups)) if sets else g, pages))(
                make_input(
                    make_arrivals(num_requests=150, rate=rate, num_adapters=adapters, cv=cv, output=output, seed=seed),
                    num_groups=groups,
                    engine=engine,
                    shape=shape,
                )
            ),
            max_in_flight=in_flight,
            adapter_tier=tier,
            router=router,
        )
    ),
    seed=st.integers(0, 1000),
    rate=st.sampled_from([5.0, 50.0, 1000.0]),
    adapters=st.sampled_from([1, 7, 90]),
    groups=st.integers(1, 3),
    cv=st.sampled_from([1.0, 4.0]),
    sets=st.booleans(),
    engine=st.builds(
        EngineConfig,
        max_running=st.sampled_from([1, 5, 64]),
        max_waiting=st.sampled_from([1, 30]),
        max_step_tokens=st.sampled_from([64, 300, 2048]),
        prefix_cache=st.booleans(),
        max_adapter_bytes=st.sampled_from([None, 90 << 21, 400 << 21]),
    ),
    in_flight=st.sampled_from([1, 2]),
    tier=st.sampled_from([Tier.HOST, Tier.DISK]),
    output=st.sampled_from([1.0, 60.0]),
    router=st.sampled_from([RouterConfig(), RouterConfig(max_queued_requests=5, max_queue_wait_s=0.5)]),
    shape=st.sampled_from([Shape(), Shape(tp=2), Shape(pp=2)]),
    pages=st.sampled_from([None, 250, 600]),
)


@settings(deadline=None, max_examples=60)
@given(inputs)
def test_nothing_is_lost_and_nothing_stays(given_: SimulationInput) -> None:
    workload = Workload.of(given_.arrivals, given_.adapters)
    cluster = Cluster.of(given_, workload)
    knobs = knobs_of(given_, cluster)
    state = state_of(given_, workload, cluster, knobs)
    fast.run(state, knobs)
    replicas, requests = state.replicas, state.requests
    for name in ("num_running", "num_waiting", "num_prefilling", "num_decoding", "num_ends", "num_tenants"):
        assert not replicas[name].any(), name
    for name in ("decode_offset", "decode_lora", "decode_adapters"):
        assert not replicas[name].any(), name
    assert not state.load.any()
    assert not state.accounts["num_active"].any()
    assert not state.num_active.any()
    assert not state.phases.any()
    assert not state.pairs["users"].any()
    assert not state.pairs["sent"].any()
    assert not state.views["queued"].any()
    assert not state.views["prompts"].any()
    assert not state.pairs["decoding"].any()
    held = replicas["num_free"] + replicas["num_cached"] + replicas["num_adapter_pages"]
    assert np.array_equal(held, replicas["num_pages"])
    assert np.array_equal(replicas["num_idle"], replicas["num_adapter_pages"])
    assert (replicas["num_adapter_pages"] <= replicas["max_adapter_pages"]).all()
    served = requests["outcome"] == Outcome.SERVED
    assert np.array_equal(served, np.isfinite(requests["end_s"]))
    assert (requests["first_s"][served] > requests["arrival_s"][served]).all()
    assert (requests["end_s"][served] >= requests["first_s"][served]).all()
    assert (replicas["busy_s"] <= np.max(requests["end_s"][served], initial=0.0) + 1e-6).all()


@pytest.mark.parametrize(("max_in_flight", "shape"), [(1, Shape()), (2, Shape()), (2, Shape(pp=2))], ids=str)
def test_preempted_requests_end_and_are_about_as_many_as_in_the_engine(max_in_flight: int, shape: Shape) -> None:
    arrivals = make_arrivals(num_requests=600, rate=20, num_adapters=3, prompt=200, output=250, spread=0.4)
    given_ = dataclasses.replace(
        _with_pages(make_input(arrivals, num_groups=1, shape=shape), 700), max_in_flight=max_in_flight
    )
    ours, theirs = fast.simulate(given_), simulate_exact(given_)
    assert ours.score.num_served == theirs.score.num_served == 600
    assert theirs.groups[0].num_preemptions > 300
    assert ours.groups[0].num_preemptions == pytest.approx(theirs.groups[0].num_preemptions, rel=0.2)
    assert ours.score.ttft_s["mean"] == pytest.approx(theirs.score.ttft_s["mean"], rel=0.03)
    assert ours.end_s == pytest.approx(theirs.end_s, rel=0.02)


def test_the_same_input_gives_the_same_result() -> None:
    given_ = SCENARIOS["many-adapters"](0)
    one, other = fast.simulate(given_), fast.simulate(given_)
    assert np.array_equal(one.ttft_s, other.ttft_s)
    assert one.score == other.score
