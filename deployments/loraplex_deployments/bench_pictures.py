"""Results of ``loraplex bench serve`` as a table and pictures. Pure but for reading the files. Called by notebooks."""

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
from loraplex.core.errors import BadConfig
from loraplex.pages.grouped_bars import Bars, grouped_bars
from loraplex.pages.page import table

from loraplex_deployments.bench_results import ServeBenchResult

_ROLES = ("gateway", "haproxy", "client")


def read_serve_results(paths: Iterable[Path]) -> dict[str, ServeBenchResult]:
    """By the files' names. Raises BadConfig naming one that is none."""
    found = {}
    for path in sorted(paths):
        try:
            found[path.stem] = msgspec.json.decode(path.read_bytes(), type=ServeBenchResult)
        except (OSError, msgspec.DecodeError) as error:
            raise BadConfig(f"{path}: not a result of bench serve: {error}") from error
    return found


def serve_chart(results: dict[str, ServeBenchResult]) -> str:
    """Tokens per second through HTTP as a share of those of the engine alone."""
    shares = [one.summary.http_over_engine for one in results.values()]
    values = [math.nan if share is None else share for share in shares]
    groups = [f"{name}\n{_work(one)}" for name, one in results.items()]
    return grouped_bars(groups, [Bars(name="HTTP", values=values)], y_label="of the engine alone", y_high=1.0)


def cpu_chart(results: dict[str, ServeBenchResult]) -> str:
    """CPU time of a token, by who spends it."""
    spent = [one.summary.cpu for one in results.values()]
    sides = [
        Bars(name=role, values=[cpu[role].ms_per_token if role in cpu else math.nan for cpu in spent])
        for role in _ROLES
    ]
    groups = [f"{name}\n{_work(one)}" for name, one in results.items()]
    return grouped_bars(groups, sides, y_label="CPU ms a token")


def serve_table(results: dict[str, ServeBenchResult]) -> str:
    """The platform beside the engine alone, medians over the rounds."""
    columns = ["", "machine", "streams", "adapters", "gateways", "engine tokens/s", "HTTP tokens/s", "ratio"]
    rows = []
    for name, one in results.items():
        found, load = one.summary, one.options.load
        ttft = found.single_ttft_ms.get("p50")
        rows.append(
            [
                name,
                one.machine.device_name,
                load.concurrency or load.requests,
                load.adapters,
                one.options.gateways,
                found.engine_tokens_per_s,
                found.http_tokens_per_s,
                found.http_over_engine,
                None if ttft is None else ttft.added,
            ]
        )
    return table([*columns, "TTFT added, lone request, ms"], rows)


def _work(result: ServeBenchResult) -> str:
    load = result.options.load
    return f"{load.concurrency or load.requests} streams, {load.adapters} adapters"
