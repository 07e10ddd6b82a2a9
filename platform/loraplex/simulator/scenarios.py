"""The stated set of situations over which the fast simulator is held against the exact one.

Llama-3 shapes on H100, with the shipped analytic costs; arrivals are made up from a seed. Called by ``compare``, tests
and the speed benchmark.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from loraplex.core.ids import BaseModelId
from loraplex.core.plan import AdapterShare, BasePlacement, GroupPlan, Plan, Shape
from loraplex.cost.loads import Tier
from loraplex.cost.profile import CostProfile
from loraplex.engine import EngineConfig
from loraplex.simulator.types import AdapterSize, CostKey, ReplicaCost, SimulationInput, Slo
from loraplex.traces.arrivals import AdapterName, Arrivals

GPU = "h100-80gb"
SMALL, LARGE = BaseModelId("llama3-8b"), BaseModelId("llama3-70b")
_PAGE_BYTES = 2 << 20
"""Of the small base."""
_RANKS = (8, 16, 32, 64)
_SLO = Slo(ttft_s=0.05, tpot_s=0.011)
"""Within the spread of the latencies, as each scenario's: a shift of them shows in the attainment."""


def make_arrivals(
    *,
    num_requests: int,
    rate: float,
    num_adapters: int,
    num_tenants: int = 8,
    cv: float = 1.0,
    zipf: float = 0.9,
    prompt: float = 256.0,
    output: float = 128.0,
    spread: float = 0.7,
    bases: tuple[BaseModelId, ...] = (SMALL,),
    seed: int = 0,
) -> Arrivals:
    """Gamma gaps; adapters by Zipf; lognormal lengths with medians ``prompt`` and ``output`` (at most 6000 and 1800).
    Adapter i belongs to tenant i mod ``num_tenants`` and to base i mod the number of bases."""
    random = np.random.default_rng(seed)
    gaps_s = random.gamma(1 / cv**2, cv**2 / rate, size=num_requests)
    popularity = np.arange(1, num_adapters + 1) ** -zipf
    adapter = random.choice(num_adapters, size=num_requests, p=popularity / popularity.sum()).astype(np.int32)

    def lengths(median: float, most: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        drawn = random.lognormal(np.log(median), spread, size=num_requests)
        return np.clip(drawn, 1, most).astype(np.int32)

    return Arrivals(
        origin_s=0.0,
        arrival_s=np.cumsum(gaps_s),
        adapter=adapter,
        base_model=(adapter % len(bases)).astype(np.int32),
        tenant=(adapter % num_tenants).astype(np.int32),
        prompt_tokens=lengths(prompt, 6000),
        output_tokens=lengths(output, 1800),
        adapters=tuple(AdapterName(f"t{i % num_tenants}", bases[i % len(bases)], f"a{i}") for i in range(num_adapters)),
        base_models=bases,
        tenants=tuple(f"t{i}" for i in range(num_tenants)),
    )


def make_input(
    arrivals: Arrivals,
    *,
    num_groups: int,
    shape: Shape | None = None,
    bases: tuple[BaseModelId, ...] = (SMALL,),
    engine: EngineConfig | None = None,
    slo: Slo = _SLO,
) -> SimulationInput:
    """Equal groups that hold all ``bases`` and take every adapter; ranks 8 to 64 by turns."""
    engine, shape = engine or EngineConfig(), shape or Shape()
    profile = CostProfile.load(GPU)
    costs = {}
    for base in bases:
        key = CostKey(gpu=GPU, base_model_id=base, shape=shape)
        known = profile if base in (SMALL, LARGE) else profile.renamed(SMALL, base)
        costs[key] = ReplicaCost.of(known, key, engine)
    placed = tuple(BasePlacement(base_model_id=base) for base in bases)
    groups = tuple(GroupPlan(name=f"g{i}", shape=shape, gpu=GPU, bases=placed) for i in range(num_groups))
    return SimulationInput(
        plan=Plan(version=1, groups=groups),
        arrivals=arrivals,
        adapters=tuple(AdapterSize(lora_rank=_RANKS[i % 4]) for i in range(len(arrivals.adapters))),
        costs=costs,
        slo=slo,
        engine=engine,
    )


def with_adapter_sets(given: SimulationInput, *, num_replicas: int) -> SimulationInput:
    """Each adapter on ``num_replicas`` neighbouring groups, the first of them with twice the weight of the others."""
    groups = given.plan.groups
    listed: list[list[AdapterShare]] = [[] for _ in groups]
    for index, adapter in enumerate(given.arrivals.adapters):
        for offset in range(num_replicas):
            weight = 2.0 if offset == 0 else 1.0
            share = AdapterShare(tenant=adapter.tenant, name=adapter.name, weight=weight)
            listed[(index + offset) % len(groups)].append(share)
    plan = Plan(
        version=given.plan.version,
        groups=tuple(
            dataclasses.replace(group, bases=(dataclasses.replace(group.bases[0], adapters=tuple(shares)),))
            for group, shares in zip(groups, listed, strict=True)
        ),
    )
    return dataclasses.replace(given, plan=plan)


def _steady(seed: int) -> SimulationInput:
    return make_input(make_arrivals(seed=seed, num_requests=2000, rate=16, num_adapters=20), num_groups=1)


def _one_step_in_flight(seed: int) -> SimulationInput:
    return dataclasses.replace(_steady(seed), max_in_flight=1)


def _many_adapters(seed: int) -> SimulationInput:
    return make_input(
        make_arrivals(seed=seed, num_requests=3000, rate=80, num_adapters=400, num_tenants=40), num_groups=4
    )


def _adapter_sets(seed: int) -> SimulationInput:
    return with_adapter_sets(_many_adapters(seed), num_replicas=2)


def _bursty(seed: int) -> SimulationInput:
    return make_input(make_arrivals(seed=seed, num_requests=3000, rate=40, cv=4, num_adapters=100), num_groups=4)


def _overload(seed: int) -> SimulationInput:
    engine = EngineConfig(max_running=64, max_waiting=16)
    arrivals = make_arrivals(seed=seed, num_requests=3000, rate=60, cv=2, num_adapters=60)
    return make_input(arrivals, num_groups=2, engine=engine, slo=Slo(ttft_s=2.0, tpot_s=0.0145))


def _refusals(seed: int) -> SimulationInput:
    given = _overload(seed)
    arrivals = make_arrivals(seed=seed, num_requests=3000, rate=90, num_adapters=60)
    router = type(given.router)(max_queued_requests=64, max_queue_wait_s=5.0)
    return dataclasses.replace(given, arrivals=arrivals, router=router)


def _short_of_kv(seed: int) -> SimulationInput:
    """More requests run than their KV fits: some wait for pages, some are preempted."""
    arrivals = make_arrivals(seed=seed, num_requests=1500, rate=20, num_adapters=12, prompt=300, output=900, spread=0.3)
    engine = EngineConfig(max_running=1024)
    return make_input(arrivals, num_groups=1, engine=engine, slo=Slo(ttft_s=1.0, tpot_s=0.046))


def _adapter_churn(seed: int) -> SimulationInput:
    engine = EngineConfig(max_adapter_bytes=2500 * _PAGE_BYTES)
    arrivals = make_arrivals(seed=seed, num_requests=2500, rate=20, num_adapters=300, zipf=0.7, output=64)
    return make_input(arrivals, num_groups=2, engine=engine)


def _adapter_thrashing(seed: int) -> SimulationInput:
    """Adapters have a fifth of the room of the scenario above: most requests load theirs."""
    engine = EngineConfig(max_adapter_bytes=600 * _PAGE_BYTES)
    arrivals = make_arrivals(seed=seed, num_requests=2500, rate=14, num_adapters=300, zipf=0.4, output=64)
    return make_input(arrivals, num_groups=2, engine=engine)


def _long_prompts(seed: int) -> SimulationInput:
    arrivals = make_arrivals(seed=seed, num_requests=1500, rate=8, num_adapters=30, prompt=2500, output=100)
    return make_input(arrivals, num_groups=2, slo=Slo(ttft_s=0.26, tpot_s=0.017))


def _from_disk(seed: int) -> SimulationInput:
    return dataclasses.replace(_many_adapters(seed), adapter_tier=Tier.DISK)


def _tensor_parallel(seed: int) -> SimulationInput:
    arrivals = make_arrivals(seed=seed, num_requests=1500, rate=12, num_adapters=40, bases=(LARGE,))
    return make_input(arrivals, num_groups=2, shape=Shape(tp=4), bases=(LARGE,), slo=Slo(ttft_s=0.12, tpot_s=0.0235))


def _pipeline(seed: int) -> SimulationInput:
    arrivals = make_arrivals(seed=seed, num_requests=1500, rate=20, num_adapters=40)
    return make_input(arrivals, num_groups=2, shape=Shape(pp=2), slo=Slo(ttft_s=0.028, tpot_s=0.0078))


def _two_bases(seed: int) -> SimulationInput:
    bases = (SMALL, BaseModelId("another-8b"))
    arrivals = make_arrivals(seed=seed, num_requests=2000, rate=20, num_adapters=40, bases=bases)
    given = make_input(arrivals, num_groups=2, bases=bases, slo=Slo(ttft_s=0.06, tpot_s=0.0185))
    return dataclasses.replace(given, turn_s=5e-4)


def _shared_pipeline(seed: int) -> SimulationInput:
    bases = (SMALL, BaseModelId("another-8b"))
    arrivals = make_arrivals(seed=seed, num_requests=1500, rate=20, cv=3, num_adapters=40, bases=bases)
    return make_input(arrivals, num_groups=2, shape=Shape(pp=2), bases=bases, slo=Slo(ttft_s=0.08, tpot_s=0.025))


SCENARIOS: Mapping[str, Callable[[int], SimulationInput]] = {
    "steady": _steady,
    "one-step-in-flight": _one_step_in_flight,
    "many-adapters": _many_adapters,
    "adapter-sets": _adapter_sets,
    "bursty": _bursty,
    "overload": _overload,
    "refusals": _refusals,
    "short-of-kv": _short_of_kv,
    "adapter-churn": _adapter_churn,
    "adapter-thrashing": _adapter_thrashing,
    "long-prompts": _long_prompts,
    "from-disk": _from_disk,
    "tensor-parallel": _tensor_parallel,
    "pipeline": _pipeline,
    "two-bases": _two_bases,
    "shared-pipeline": _shared_pipeline,
}
