"""``python -m loraplex.profiler.simulated``: how near the exact simulator is to the real engine on this machine.

Runs made-up arrivals through a replica in real time and through the exact simulator, and prints both sides of
throughput, TTFT, TPOT and SLO attainment. The simulator's cost of a step is fitted to the steps of the same round, and
its clock runs at the machine's pace in each second: what differs is then the simulator, not the speed of a shared
machine at another time. What a first token waits for beside its step is measured with lone requests before the rounds.
A profile measured before says the rate. Medians over several rounds of arrivals; the load, as a share of what the
simulator says the replica can do, and the targets are stated. The default model has the shape of the demo base. Owns
the experiment; the parts are those of profiler, replica and simulator.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from loraplex.bench.options import EngineSetup
from loraplex.bench.random_adapters import random_manifests
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.core.step import Executor
from loraplex.cost.samples import Samples
from loraplex.cost.step_cost import StepCost
from loraplex.engine import EngineConfig
from loraplex.loadgen.comparison import compare
from loraplex.loadgen.outcomes import Outcomes
from loraplex.model_runner.build import build_executor
from loraplex.model_runner.config import ExecutorConfig
from loraplex.profiler.engine_replay import AdapterFiles, EngineReplay
from loraplex.profiler.fit import fit_mean
from loraplex.profiler.measure import ProfileOptions, measure
from loraplex.profiler.pace import Pace, predicted_at
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.scenarios import make_arrivals
from loraplex.simulator.types import AdapterSize, CostKey, IntArray, ReplicaCost, SimulationInput, Slo
from loraplex.traces.arrivals import Arrivals

BASE = BaseModelId("demo")
_GPU = "cpu"
_LORA_RANK = 16
_WARM_S = 3.0
_LIMIT = 0.05
_TARGET_PERCENTILE = 80


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str = "random:smollm2-135m"
    threads: int = 1
    max_running: int = 8
    max_step_tokens: int = 256
    num_pages: int = 400
    adapters: int = 4
    prompt: float = 48.0
    """Median; lengths are lognormal."""
    output: float = 16.0
    load: float = 0.6
    """Share of the rate at which the simulated replica would be always full."""
    seconds: float = 40.0
    """Of arrivals, in a round."""
    rounds: int = 6
    profile_s: float = 90.0
    """For the profile that the rate follows from."""
    pace_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Length of the windows in which the machine has one pace; 0: one for the whole round."""
    seed: int = 0


def run(options: Options) -> dict[str, Any]:
    """One entry a figure: measured and predicted in each round, and the median of the errors."""
    measurement = measure(_profile_options(options), say=lambda line: print(line, file=sys.stderr))
    engine = EngineConfig(max_running=options.max_running, max_step_tokens=options.max_step_tokens)

    profiled = ReplicaCost.of(measurement.profile(), CostKey(gpu=_GPU, base_model_id=BASE, shape=Shape()), engine)

    def fitted(steps: Samples) -> ReplicaCost:
        # Of the mean: the replica waited also for steps that the system held up.
        mean = fit_mean(*steps.arrays())
        return dataclasses.replace(profiled, step=StepCost(interval=mean, latency=mean))

    executor = build_executor(
        ExecutorConfig(
            num_threads=options.threads,
            num_pages=options.num_pages,
            max_rows=options.max_running,
            max_step_tokens=options.max_step_tokens,
        ),
        model=options.model,
        base_model_id=BASE,
    )
    return {
        "options": msgspec.to_builtins(options),
        "machine": measurement.note,
        **rounds_of(options, executor, fitted(measurement.fitted), engine, fitted),
    }


def rounds_of(
    options: Options,
    executor: Executor,
    cost: ReplicaCost,
    engine: EngineConfig,
    fitted: Callable[[Samples], ReplicaCost],
) -> dict[str, Any]:
    """Both sides of each round; ``slowness``: percentiles over its windows. ``cost``: of ``executor``, which is closed
    at the end, for the rate; ``fitted``: to the steps of a round."""
    rate = options.load * _capacity(options, cost, engine)
    manifests = random_manifests(executor.model, count=options.adapters, lora_ranks=(_LORA_RANK,), seed=options.seed)
    digests = {index: manifest.digest for index, manifest in enumerate(manifests)}
    in_flight = executor.max_in_flight
    replica = EngineReplay(executor, engine, AdapterFiles(manifests, executor.model))
    rounds, paces, slo = [], [], None
    try:
        hand_over_s = replica.hand_over_s(_lone())
        for seed in range(options.seed, options.seed + options.rounds):
            arrivals = _with_warm_up(_arrivals(options, rate, seed=seed), options.adapters)
            measured = replica.run(arrivals, digests, seed=seed).since(_WARM_S)
            steps = replica.steps()
            of_round = fitted(steps)
            composition, seconds = steps.arrays()
            starts_s, expected_s = replica.step_starts(), of_round.step.interval.seconds(composition)
            window_s = options.pace_s or float(starts_s[-1] + seconds[-1])
            pace = Pace.of(starts_s, seconds, expected_s, window_s=window_s)
            given = _input(arrivals, of_round, engine)
            given = dataclasses.replace(given, max_in_flight=in_flight, overhead_s=hand_over_s)
            predicted = predicted_at(pace, given).since(_WARM_S)
            paces.append({f"p{at}": float(np.percentile(pace.slowness, at)) for at in (10, 50, 90)})
            slo = slo or _targets(predicted)
            rounds.append(_figures(measured, predicted, arrivals, slo))
    finally:
        replica.close()
    assert slo is not None, "at least one round"
    return {
        "rate_per_s": rate,
        "hand_over_s": hand_over_s,
        "slowness": paces,
        "slo": dataclasses.asdict(slo),
        "rounds": rounds,
        "median_error": {name: statistics.median(one[name]["error"] for one in rounds) for name in rounds[0]},
    }


def _profile_options(options: Options) -> ProfileOptions:
    setup = EngineSetup(
        model=options.model,
        threads=options.threads,
        max_running=options.max_running,
        max_step_tokens=options.max_step_tokens,
        num_pages=options.num_pages,
    )
    return ProfileOptions(
        setup=setup,
        base=BASE,
        gpu=_GPU,
        num_adapters=options.adapters,
        max_request_tokens=_longest(options),
        budget_s=options.profile_s,
        seed=options.seed,
    )


def _longest(options: Options) -> int:
    """Tokens of the longest request that is drawn."""
    return int(6 * (options.prompt + options.output))


def _arrivals(options: Options, rate: float, *, seed: int, num_requests: int | None = None) -> Arrivals:
    count = num_requests or max(8, round(rate * options.seconds))
    made = make_arrivals(
        num_requests=count,
        rate=rate,
        num_adapters=max(options.adapters, 1),
        num_tenants=2,
        prompt=options.prompt,
        output=options.output,
        bases=(BASE,),
        seed=seed,
    )
    # A quarter of the requests is for the base.
    base_only = np.random.default_rng(seed).random(count) < (0.25 if options.adapters else 1.0)
    half = _longest(options) // 2
    return dataclasses.replace(
        made,
        adapter=np.where(base_only, -1, made.adapter).astype(np.int32),
        prompt_tokens=np.clip(made.prompt_tokens, 2, half).astype(np.int32),
        output_tokens=np.clip(made.output_tokens, 2, half).astype(np.int32),
    )


def _with_warm_up(arrivals: Arrivals, num_adapters: int) -> Arrivals:
    """A short request of each adapter first, so that both sides begin with all of them resident."""
    if num_adapters == 0:
        return dataclasses.replace(arrivals, arrival_s=arrivals.arrival_s + _WARM_S)

    def before(values: IntArray, warm: Sequence[int]) -> IntArray:
        return np.concatenate([np.array(warm, dtype=np.int32), values])

    zeros, ones = [0] * num_adapters, [1] * num_adapters
    return dataclasses.replace(
        arrivals,
        arrival_s=np.concatenate([np.zeros(num_adapters), arrivals.arrival_s + _WARM_S]),
        adapter=before(arrivals.adapter, range(num_adapters)),
        base_model=before(arrivals.base_model, zeros),
        tenant=before(arrivals.tenant, zeros),
        prompt_tokens=before(arrivals.prompt_tokens, ones),
        output_tokens=before(arrivals.output_tokens, ones),
    )


def _input(arrivals: Arrivals, cost: ReplicaCost, engine: EngineConfig) -> SimulationInput:
    key = CostKey(gpu=_GPU, base_model_id=BASE, shape=Shape())
    group = GroupPlan(name="replica", shape=Shape(), gpu=key.gpu, bases=(BasePlacement(base_model_id=BASE),))
    return SimulationInput(
        plan=Plan(version=1, groups=(group,)),
        arrivals=arrivals,
        adapters=tuple(AdapterSize(lora_rank=_LORA_RANK) for _ in arrivals.adapters),
        costs={key: cost},
        slo=Slo(),
        engine=engine,
    )


def _lone() -> Arrivals:
    """The shortest request for the base."""
    one = make_arrivals(num_requests=1, rate=1.0, num_adapters=1, num_tenants=1, bases=(BASE,))
    ones = np.ones(1, dtype=np.int32)
    return dataclasses.replace(one, arrival_s=np.zeros(1), adapter=-ones, prompt_tokens=ones, output_tokens=ones)


def _capacity(options: Options, cost: ReplicaCost, engine: EngineConfig) -> float:
    """Requests per second of the simulated replica when all come at once."""
    arrivals = _arrivals(options, 1.0, seed=options.seed, num_requests=200)
    at_once = dataclasses.replace(arrivals, arrival_s=np.zeros(len(arrivals)))
    patient = msgspec.structs.replace(engine, max_waiting=len(arrivals))
    return len(arrivals) / simulate_exact(_input(at_once, cost, patient)).end_s


def _targets(predicted: Outcomes) -> Slo:
    """Within the spread of the latencies, so that a shift of them shows in the attainment."""
    return Slo(
        ttft_s=float(np.percentile(predicted.ttft_s, _TARGET_PERCENTILE)),
        tpot_s=float(np.percentile(predicted.tpot_s, _TARGET_PERCENTILE)),
    )


def _figures(measured: Outcomes, predicted: Outcomes, arrivals: Arrivals, slo: Slo) -> dict[str, dict[str, Any]]:
    """``error``: of the attainment in points of 1, of the others relative to what was measured."""
    output = arrivals.output_tokens[arrivals.arrival_s >= _WARM_S]
    rates = [_tokens_per_s(side, output) for side in (measured, predicted)]
    found: dict[str, dict[str, Any]] = {
        "output_tokens_per_s": {"measured": rates[0], "predicted": rates[1], "error": rates[1] / rates[0] - 1},
    }
    for figure in compare(measured, predicted, slo):
        found[figure.name] = {
            "measured": figure.measured,
            "predicted": figure.predicted,
            "error": figure.difference,
        }
    return found


def _tokens_per_s(side: Outcomes, output_tokens: IntArray) -> float:
    """From the first arrival to the last token."""
    end_s = side.at_s + side.ttft_s + side.tpot_s * (output_tokens - 1)
    return float(output_tokens.sum() / (end_s.max() - side.at_s.min()))


def main() -> None:
    parser = argparse.ArgumentParser(description="The exact simulator against the real engine, on this machine.")
    for name, default in msgspec.to_builtins(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    given = vars(parser.parse_args())
    out = given.pop("out")
    started_s, cpu_s = time.monotonic(), time.process_time()
    result = run(msgspec.convert(given, Options))
    result["wall_s"], result["cpu_s"] = time.monotonic() - started_s, time.process_time() - cpu_s
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    slo = result["slo"]
    print(result["machine"])
    print(
        f"{result['rate_per_s']:.2f} requests/s, targets TTFT {1e3 * slo['ttft_s']:.0f} ms, "
        f"TPOT {1e3 * slo['tpot_s']:.1f} ms; measured / predicted in each round"
    )
    within = 0
    for name, error in result["median_error"].items():
        scale = 1e3 if name.endswith(("p50_s", "p90_s", "p99_s")) else 1.0
        sides = [
            f"{scale * one[name]['measured']:.4g} / {scale * one[name]['predicted']:.4g}" for one in result["rounds"]
        ]
        within += abs(error) <= _LIMIT
        label = name if scale == 1.0 else f"{name.removesuffix('_s')} ms"
        print(f"{label:<20} {'   '.join(f'{side:>17}' for side in sides)}   median error {error:+.1%}")
    print(f"{within} of {len(result['median_error'])} within {_LIMIT:.0%}; {result['wall_s']:.0f} s")


if __name__ == "__main__":
    main()
