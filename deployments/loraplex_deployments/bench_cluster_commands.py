"""``loraplex bench faults`` and ``loraplex bench replan``: options in, JSON out. Found through the entry-point group
``loraplex.commands``."""

import contextlib
import sys
from typing import Annotated, Any

import msgspec
import typer
from loraplex.cli.output import print_json
from loraplex.cli.shapes import parse_shape, parse_shapes
from loraplex.core.plan import Shape

NodesOption = Annotated[int, typer.Option(min=2, help="Ray nodes on this machine, beside the head.")]
ReplicasOption = Annotated[int, typer.Option(min=2, help="Replicas of the base.")]
GatewaysOption = Annotated[int, typer.Option(min=1, help="Gateway processes.")]
AdaptersOption = Annotated[int, typer.Option(min=0, help="Adapters that requests take in turn.")]
FactorOption = Annotated[float, typer.Option(min=0.01, help="How many times slower than the profile steps are.")]


def faults_command(
    faults: Annotated[
        str,
        typer.Option(
            help="What is killed in turn: replica, node, controller, serve-controller, gateway, rank (of a replica "
            "that computes on several), rank-hangs (stopped, not killed)."
        ),
    ] = "replica,node,controller,serve-controller,gateway",
    streams: Annotated[int, typer.Option(min=1, help="Open streams.")] = 32,
    output_tokens: Annotated[int, typer.Option("--output", min=50, help="Tokens of each.")] = 400,
    nodes: NodesOption = 3,
    replicas: ReplicasOption = 4,
    gateways: GatewaysOption = 1,
    adapters: AdaptersOption = 8,
    paced: Annotated[
        bool,
        typer.Option(
            help="Replicas take the time of an H100 and compute nothing, so that pauses are the platform's; otherwise "
            "a tiny model with random weights."
        ),
    ] = True,
    factor: FactorOption = 8.0,
    shape: Annotated[str, typer.Option(help="TPxPP: shards and stages of each replica.")] = "1x1",
) -> None:
    """Kills processes under open streams: who broke, who said the same, how long was silence.

    Starts a Ray of several nodes on this machine, and a platform on it, and ends both; prints JSON.
    """
    from loraplex_deployments.bench_faults import RANK_FAULTS, Fault, FaultOptions, run_fault_bench

    try:
        chosen = tuple(Fault(name.strip()) for name in faults.split(","))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--faults") from None
    cluster = _cluster(nodes, replicas, gateways, adapters, factor if paced else None, parse_shape(shape))
    if RANK_FAULTS.intersection(chosen) and (paced or cluster.shape.num_ranks == 1):
        raise typer.BadParameter("ranks are there with --no-paced and a --shape of several", param_hint="--faults")
    options = FaultOptions(cluster=cluster, streams=streams, output_tokens=output_tokens, faults=chosen)
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there
        result = run_fault_bench(options, _say)
    print_json(msgspec.to_builtins(result))


def replan_command(
    changes: Annotated[int, typer.Option(min=1, help="Plans that are applied one after the other.")] = 20,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests per second, at random times.")] = 6.0,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Prompt tokens of each.")] = 64,
    output_tokens: Annotated[int, typer.Option("--output", min=1, help="Output tokens of each.")] = 48,
    calm: Annotated[float, typer.Option(min=0.1, help="Seconds before each change, to compare with.")] = 5.0,
    nodes: NodesOption = 4,
    replicas: ReplicasOption = 4,
    gateways: GatewaysOption = 1,
    adapters: AdaptersOption = 8,
    factor: FactorOption = 4.0,
    shapes: Annotated[
        str | None,
        typer.Option(help="TPxPP with commas between: all groups take each in turn; a tiny random model computes."),
    ] = None,
) -> None:
    """Changes the plan under load: adapters move, replicas come and go, two groups become one of two shards.

    Without --shapes replicas take the time of an H100 and compute nothing. Starts a Ray of several nodes on this
    machine, and a platform on it, and ends both; prints JSON.
    """
    from loraplex_deployments.bench_replan import ReplanOptions, run_replan_bench

    chosen = () if shapes is None else parse_shapes(shapes)
    cluster = _cluster(
        nodes, replicas, gateways, adapters, None if chosen else factor, chosen[0] if chosen else Shape()
    )
    options = ReplanOptions(
        cluster=cluster,
        shapes=chosen,
        changes=changes,
        requests_per_s=rate,
        prompt_tokens=input_tokens,
        output_tokens=output_tokens,
        calm_s=calm,
    )
    with contextlib.redirect_stdout(sys.stderr):
        result = run_replan_bench(options, _say)
    print_json(msgspec.to_builtins(result))


def _cluster(nodes: int, replicas: int, gateways: int, adapters: int, factor: float | None, shape: Shape) -> Any:
    # Imported here: ray takes a second, and `--help` needs none of it.
    from loraplex_deployments.bench_cluster import ClusterSetup, PacedSetup

    paced = None if factor is None else PacedSetup(factor=factor)
    return ClusterSetup(nodes=nodes, replicas=replicas, gateways=gateways, adapters=adapters, paced=paced, shape=shape)


def _say(line: str) -> None:
    typer.echo(line, err=True)
