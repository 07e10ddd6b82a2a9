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
from loraplex.simulator import crowds
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.scenarios import make_input
from loraplex.simulator.types import Outcome, SimulationInput, SimulationResult, Slo
from loraplex.tenancy.fair_shares import jain_index, max_min_shares

NUM_REPLICAS = 4
SPAN_S = 40.0
NUM_TENANTS = 8
GREEDY_FROM_S, GREEDY_UNTIL_S = 5.0, 25.0

POLICIES = ("predicted-finish", "least-loaded", "consistent-hash", "pow2-multiplexed")


def flash_crowd(seed: int) -> SimulationInput:
    """Three spans: adapters come from disk, calm, and the crowd, which alone is scored."""
    arrivals = crowds.flash_crowd(
        seed=seed,
        spans_s=(SPAN_S, SPAN_S, SPAN_S),
        ramp_s=5.0,
        crowd_factor=20.0,
        hot_rate=2.5,
        other_rate=40.0,
        num_adapters=100,
        num_tenants=NUM_TENANTS,
    )
    given = make_input(arrivals, num_groups=NUM_REPLICAS, slo=Slo(ttft_s=0.06, tpot_s=0.0145))
    return dataclasses.replace(given, adapter_tier=Tier.DISK, score_from_s=2 * SPAN_S, score_until_s=3 * SPAN_S)


def greedy_tenant(seed: int) -> SimulationInput:
    """All tenants but one ask for 0.8 of an equal share of what the replicas can do; one for ten shares."""
    arrivals = crowds.greedy_tenant(
        seed=seed,
        end_s=GREEDY_UNTIL_S,
        share_per_s=14.0,
        asked=(0.8,) * (NUM_TENANTS - 1),
        greedy_factor=10.0,
        adapters_per_tenant=7,
    )
    engine = EngineConfig(max_running=64, max_waiting=16)
    given = make_input(arrivals, num_groups=NUM_REPLICAS, engine=engine, slo=Slo(ttft_s=1.0, tpot_s=0.02))
    router = RouterConfig(max_queued_requests=256, max_queue_wait_s=10.0)
    return dataclasses.replace(given, router=router, score_from_s=GREEDY_FROM_S, score_until_s=GREEDY_UNTIL_S)


def study_flash_crowd(seed: int) -> dict[str, dict[str, float]]:
    found = {}
    given = flash_crowd(seed)
    times, others = given.arrivals.arrival_s, given.arrivals.tenant != 0
    crowd = times >= 2 * SPAN_S
    for name in POLICIES:
        result = _simulated(given, name)
        during = _ttft_p99_s(result, others & crowd)
        calm = _ttft_p99_s(result, others & (times >= SPAN_S) & ~crowd)
        found[name] = {
            "attainment": result.score.attainment,
            "ttft_p99_s": result.score.ttft_s["p99"],
            "others_ttft_p99_s": during,
            "others_calm_ttft_p99_s": calm,
            "others_ratio": during / calm,
            "adapter_loads": sum(group.num_loads for group in result.groups),
        }
    return found


def study_greedy_tenant(seed: int) -> dict[str, dict[str, float]]:
    """Throughput in requests of the scored span that are served; a tenant's fair one is the max-min fair part of their
    sum."""
    found = {}
    given = greedy_tenant(seed)
    tenant, times = given.arrivals.tenant, given.arrivals.arrival_s
    scored = (times >= given.score_from_s) & (times < given.score_until_s)
    asked = np.bincount(tenant[scored], minlength=NUM_TENANTS)
    greedy = given.arrivals.tenants.index(crowds.GREEDY)
    for name in POLICIES:
        result = _simulated(given, name)
        served = np.bincount(tenant[scored & (result.outcome == Outcome.SERVED)], minlength=NUM_TENANTS)
        shares = served / max_min_shares(asked.tolist(), float(served.sum()))
        found[name] = {
            "least_share_of_others": float(np.delete(shares, greedy).min()),
            "share_of_greedy": float(shares[greedy]),
            "served_of_greedy": float(served[greedy] / asked[greedy]),
            "jain_index": jain_index(shares.tolist()),
            "others_ttft_p99_s": _ttft_p99_s(result, scored & (tenant != greedy)),
        }
    return found


def _simulated(given: SimulationInput, policy: str) -> SimulationResult:
    router = msgspec.convert({**msgspec.to_builtins(given.router), "policy": policy}, RouterConfig)
    return simulate_exact(dataclasses.replace(given, router=router))


def _ttft_p99_s(result: SimulationResult, chosen: npt.NDArray[np.bool_]) -> float:
    return float(np.percentile(result.ttft_s[chosen & (result.outcome == Outcome.SERVED)], 99))


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
