"""``loraplex bench drift``: options in, JSON out. Found through the entry-point group ``loraplex.commands``; where the
package is not installed, ``python -m loraplex_deployments.bench_drift_commands``."""

import contextlib
import sys
from typing import Annotated

import msgspec
import typer
from loraplex.cli.output import print_json
from loraplex.controller.fleet.config import PlanningConfig


def drift_command(
    rotate_s: Annotated[float, typer.Option(min=1, help="Popularity moves on after so many seconds.")] = 120.0,
    phases: Annotated[int, typer.Option(min=1, help="Of --rotate-s each.")] = 3,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests per second, all together.")] = 10.0,
    cv: Annotated[float, typer.Option(min=0.01, help="Of the gaps of an adapter.")] = 1.0,
    skew: Annotated[float, typer.Option(min=0, help="Of the adapters' popularity, as a power law.")] = 1.0,
    lengths: Annotated[str, typer.Option(help="Of prompts and outputs, as `traces synth` takes them.")] = (
        "lognormal:800,0.5,24,0.5"
    ),
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens of the longest.")] = 1536,
    adapters: Annotated[int, typer.Option(min=2, help="Of all bases, equally many each.")] = 40,
    ranks: Annotated[str, typer.Option(help="LoRA ranks of a base's adapters, in turn.")] = "16",
    bases: Annotated[str, typer.Option(help="Their names in the cost profiles, by commas.")] = "llama3-8b,llama3-8b",
    profiles: Annotated[str, typer.Option(help="Cost profiles: shipped names or files, by commas.")] = "h100-80gb",
    factor: Annotated[float, typer.Option(min=0.01, help="How many times slower than the profile steps are.")] = 6.0,
    cuda: Annotated[
        bool,
        typer.Option("--cuda", help="Replicas compute random weights of `random:BASE` on this machine's GPUs."),
    ] = False,
    gpu: Annotated[str, typer.Option(help="Type of the GPUs in the profiles.")] = "h100-80gb",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs; paced, half of them on each of two nodes.")] = 4,
    gateways: Annotated[int, typer.Option(min=1, help="Gateway processes.")] = 1,
    proxy: Annotated[str, typer.Option(help="Serve's: haproxy or python.")] = "haproxy",
    ttft_s: Annotated[float, typer.Option(min=0.001, help="Target.")] = 1.5,
    tpot_s: Annotated[float, typer.Option(min=0.001, help="Target.")] = 0.085,
    interval_s: Annotated[float, typer.Option(min=1, help="Between two runs of the controller's planner.")] = 5.0,
    window_s: Annotated[float, typer.Option(min=1, help="Of recorded traffic that it plans from.")] = 20.0,
    min_requests: Annotated[int, typer.Option(min=1, help="In that window; fewer tell it nothing.")] = 60,
    min_gain: Annotated[
        float, typer.Option(min=0, help="Attainment that a new plan must win by its simulation.")
    ] = 0.03,
    evaluations: Annotated[int, typer.Option(min=1, help="Of the search for the plan that stays.")] = 400,
    seed: int = 0,
) -> None:
    """Drifting popularity: the planner's plan for the whole trace, which stays, against the controller's re-planning.

    The same arrivals twice on one platform, which it starts and ends; prints JSON. Replicas take the time of a cost
    profile and compute nothing, unless --cuda.
    """
    from loraplex_deployments.bench_drift import DriftOptions, run_drift_bench
    from loraplex_deployments.replan_setup import ReplanBase, ReplanSetup

    names = bases.split(",")
    if adapters % len(names):
        raise typer.BadParameter(f"{adapters} adapters for {len(names)} bases", param_hint="--adapters")
    if not cuda and gpus % 2:
        raise typer.BadParameter(f"{gpus} on two nodes", param_hint="--gpus")
    lora_ranks = tuple(int(rank) for rank in ranks.split(",") if rank.strip().isdigit())
    if not lora_ranks or min(lora_ranks) < 1:
        raise typer.BadParameter(f"{ranks!r}: numbers with commas between", param_hint="--ranks")
    planning = PlanningConfig(
        profiles=tuple(profiles.split(",")),
        interval_s=interval_s,
        window_s=window_s,
        min_requests=min_requests,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        min_gain=min_gain,
        max_evaluations=200,
        max_search_s=max(10.0, interval_s),
    )
    setup = ReplanSetup(
        bases=tuple(
            ReplanBase(name=f"base{index}", profile_base=name, model=f"random:{name if cuda else 'tiny-llama'}")
            for index, name in enumerate(names)
        ),
        planning=planning,
        factor=None if cuda else factor,
        gpu=gpu,
        nodes=1 if cuda else 2,
        gpus_per_node=gpus if cuda else gpus // 2,
        adapters_per_base=adapters // len(names),
        lora_ranks=lora_ranks,
        proxy=proxy,
        gateways=gateways,
        # Nobody is refused for having waited.
        first_token_deadline_s=3600.0,
    )
    options = DriftOptions(
        setup=setup,
        rotate_s=rotate_s,
        phases=phases,
        rate=rate,
        cv=cv,
        skew=skew,
        lengths=lengths,
        max_prompt_tokens=max_prompt,
        evaluations=evaluations,
        seed=seed,
    )
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there
        result = run_drift_bench(options, _say)
    print_json(msgspec.to_builtins(result))


def _say(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    typer.run(drift_command)
