"""``python -m loraplex.simulator.routing_study [flash-crowd | greedy-tenant]``: the router's policy and others'.

Exact simulator, Llama-3-8B on H100 by the shipped costs. The same arrivals for each policy.
"""

import argparse
import dataclasses
import json

import msgspec
import numpy as np
import numpy.typing as npt

from loraplex.cost.loads import Tier
from loraplex.engine import EngineConfig
from loraplex.router.config import RouterConfig
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.scenarios import make_arrivals, make_input
from loraplex.simulator.types import Outcome, SimulationInput, SimulationResult, Slo
from loraplex.traces.arrivals import Arrivals

NUM_REPLICAS = 4
FLASH_FROM_S, FLASH_UNTIL_S, FLASH_RAMP_S, FLASH_FACTOR = 10.0, 25.0, 5.0, 20.0
NUM_TENANTS, GREEDY_FACTOR = 8, 10.0

POLICIES = ("predicted-finish", "least-loaded", "consistent-hash", "pow2-multiplexed")


def flash_crowd(seed: int, *, flash: bool = True, hot_rate: float = 2.5, other_rate: float = 40.0) -> SimulationInput:
    """One adapter, of tenant 0, comes ``FLASH_FACTOR`` times as often within ``FLASH_RAMP_S``; the others go on. Only
    the span of the crowd is scored. Without ``flash``: the same arrivals of the others, and of the adapter as before.
    Adapters lie on disk at first."""
    random = np.random.default_rng(seed)
    end_s = FLASH_UNTIL_S + 5.0
    count = round(other_rate * end_s)
    others = make_arrivals(num_requests=count, rate=other_rate, num_adapters=100, num_tenants=NUM_TENANTS, seed=seed)
    most = hot_rate * FLASH_FACTOR
    times = np.cumsum(random.exponential(1 / most, size=round(2 * most * end_s)))
    times = times[times < end_s]
    risen = np.clip((times - FLASH_FROM_S) / FLASH_RAMP_S, 0.0, 1.0) * (times < FLASH_UNTIL_S) * flash
    times = times[random.random(len(times)) < (1.0 + (FLASH_FACTOR - 1.0) * risen) / FLASH_FACTOR]
    hot = make_arrivals(num_requests=len(times), rate=1.0, num_adapters=1, num_tenants=1, seed=seed + 1)
    arrivals = _merged(others, dataclasses.replace(hot, arrival_s=times))
    given = make_input(arrivals, num_groups=NUM_REPLICAS, slo=Slo(ttft_s=0.06, tpot_s=0.0145))
    return dataclasses.replace(given, adapter_tier=Tier.DISK, score_from_s=FLASH_FROM_S, score_until_s=FLASH_UNTIL_S)


def greedy_tenant(seed: int) -> SimulationInput:
    """All tenants but one ask for 0.8 of an equal share of what the replicas can do; tenant 0 for ten shares."""
    share_per_s, end_s = 14.0, 25.0
    calm = make_arrivals(
        num_requests=round(0.8 * share_per_s * (NUM_TENANTS - 1) * end_s),
        rate=0.8 * share_per_s * (NUM_TENANTS - 1),
        num_adapters=7 * (NUM_TENANTS - 1),
        num_tenants=NUM_TENANTS - 1,
        zipf=0.0,
        seed=seed,
    )
    calm = dataclasses.replace(calm, tenants=tuple(f"calm{i}" for i in range(NUM_TENANTS - 1)))
    rate = GREEDY_FACTOR * share_per_s
    greedy = make_arrivals(
        num_requests=round(rate * end_s), rate=rate, num_adapters=7, num_tenants=1, zipf=0.0, seed=seed + 1
    )
    arrivals = _merged(calm, dataclasses.replace(greedy, tenants=("greedy",)))
    engine = EngineConfig(max_running=64, max_waiting=16)
    given = make_input(arrivals, num_groups=NUM_REPLICAS, engine=engine, slo=Slo(ttft_s=1.0, tpot_s=0.02))
    router = RouterConfig(max_queued_requests=256, max_queue_wait_s=10.0)
    return dataclasses.replace(given, router=router, score_from_s=5.0, score_until_s=end_s)


def study_flash_crowd(seed: int) -> dict[str, dict[str, float]]:
    found = {}
    given, calm = flash_crowd(seed), flash_crowd(seed, flash=False)
    for name in POLICIES:
        result, calm_result = (_simulated(one, name) for one in (given, calm))
        during, before = _others_ttft_s(given, result), _others_ttft_s(calm, calm_result)
        found[name] = {
            "attainment": result.score.attainment,
            "ttft_p99_s": result.score.ttft_s["p99"],
            "others_ttft_p99_s": during,
            "others_calm_ttft_p99_s": before,
            "others_ratio": during / before,
            "adapter_loads": sum(group.num_loads for group in result.groups),
        }
    return found


def study_greedy_tenant(seed: int) -> dict[str, dict[str, float]]:
    """Throughput in requests of the scored span that are served; a tenant's fair one is the max-min fair part of their
    sum."""
    found = {}
    given = greedy_tenant(seed)
    for name in POLICIES:
        result = _simulated(given, name)
        tenant, scored = given.arrivals.tenant, _scored(given)
        served = np.bincount(tenant[scored & (result.outcome == Outcome.SERVED)], minlength=NUM_TENANTS)
        asked = np.bincount(tenant[scored], minlength=NUM_TENANTS)
        fair = _max_min(asked.astype(np.float64), float(served.sum()))
        shares = served / fair
        greedy = given.arrivals.tenants.index("greedy")
        found[name] = {
            "least_share_of_others": float(np.delete(shares, greedy).min()),
            "share_of_greedy": float(shares[greedy]),
            "served_of_greedy": float(served[greedy] / asked[greedy]),
            "jain_index": float(shares.sum() ** 2 / (len(shares) * (shares**2).sum())),
            "others_ttft_p99_s": _ttft_p99_s(result, scored & (tenant != greedy)),
        }
    return found


def _simulated(given: SimulationInput, policy: str) -> SimulationResult:
    router = msgspec.structs.replace(given.router, policy=policy)
    return simulate_exact(dataclasses.replace(given, router=router))


def _max_min(asked: npt.NDArray[np.float64], total: float) -> npt.NDArray[np.float64]:
    """The max-min fair division of ``total``."""
    given = np.zeros_like(asked)
    left, open_ = total, np.ones(len(asked), dtype=bool)
    while open_.any():
        share = left / open_.sum()
        small = open_ & (asked <= share)
        if not small.any():
            given[open_] = share
            break
        given[small] = asked[small]
        left -= asked[small].sum()
        open_ &= ~small
    return given


def _scored(given: SimulationInput) -> npt.NDArray[np.bool_]:
    times = given.arrivals.arrival_s
    return np.asarray((times >= given.score_from_s) & (times < given.score_until_s))


def _others_ttft_s(given: SimulationInput, result: SimulationResult) -> float:
    return _ttft_p99_s(result, _scored(given) & (given.arrivals.tenant != 0))


def _ttft_p99_s(result: SimulationResult, chosen: npt.NDArray[np.bool_]) -> float:
    return float(np.percentile(result.ttft_s[chosen & (result.outcome == Outcome.SERVED)], 99))


def _merged(one: Arrivals, other: Arrivals) -> Arrivals:
    """Both, in order of time; tenants and adapters of ``other`` after those of ``one``, unless the tenants are the same
    names."""
    tenants = tuple(dict.fromkeys((*one.tenants, *other.tenants)))
    tenant_of = np.array([tenants.index(name) for name in other.tenants], dtype=np.int32)
    adapters = tuple(a._replace(name=f"{a.name}-more") for a in other.adapters)
    times = np.concatenate([one.arrival_s, other.arrival_s])
    order = np.argsort(times, kind="stable")

    def joined(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.concatenate([first, second])[order]

    return dataclasses.replace(
        one,
        arrival_s=times[order],
        adapter=joined(one.adapter, other.adapter + np.int32(len(one.adapters))),
        base_model=joined(one.base_model, other.base_model),
        tenant=joined(one.tenant, tenant_of[other.tenant]),
        prompt_tokens=joined(one.prompt_tokens, other.prompt_tokens),
        output_tokens=joined(one.output_tokens, other.output_tokens),
        adapters=(*one.adapters, *adapters),
        tenants=tenants,
    )


STUDIES = {"flash-crowd": study_flash_crowd, "greedy-tenant": study_greedy_tenant}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for study in options.studies or STUDIES:
        if study not in STUDIES:
            parser.error(f"no study {study!r}")
        found = STUDIES[study](options.seed)
        if options.json:
            print(json.dumps({study: found}))
            continue
        names = list(next(iter(found.values())))
        print(f"{study:<20}" + "".join(f"{name:>24}" for name in names))
        for policy, figures in found.items():
            print(f"{policy:<20}" + "".join(f"{figures[name]:>24.4f}" for name in names), flush=True)


if __name__ == "__main__":
    main()
