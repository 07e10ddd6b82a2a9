"""The same load through Ray and HTTP and on the engine alone, in turns on one machine: what the platform costs.

Both are up all the time and one of them idles, so that whatever else the machine does hits both alike; their arenas
have the same number of pages. Called by ``loraplex bench serve``.
"""

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec
import torch
from loraplex.bench.options import EngineLoad, EngineSetup
from loraplex.bench.results import LoadResult
from loraplex.bench.session import BenchSession
from loraplex.core.errors import BadConfig
from loraplex.loadgen.client_processes import ClientLoad, run_clients
from loraplex.loadgen.config import Endpoint, RequestConfig
from loraplex.loadgen.prompts import PromptMaker, RandomTokens, TokenizerPrompts, WordPrompts
from loraplex.loadgen.report import Latency, LoadReport, summarize
from loraplex.loadgen.targets import Target

from loraplex_deployments.bench_results import (
    Compared,
    HttpTurn,
    RoleCpu,
    Round,
    ServeBenchOptions,
    ServeBenchResult,
    ServeMachine,
    ServeSummary,
)

_WARMUP_TOKENS = 4
_MEMORY_FRACTION = 0.45
"""Of an accelerator, for the engine alone; the platform's replica gets as many pages beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A platform that is ready."""

    url: str
    targets: tuple[Target, ...]
    cpu_seconds: Callable[[], dict[str, float]]
    """By role, so far; empty where the processes are not ours."""


def run_serve_bench(
    options: ServeBenchOptions,
    requests: RequestConfig,
    targets: Sequence[Target] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> ServeBenchResult:
    """``targets`` belong to ``options.url``. Raises BadConfig, InvalidInput, and what ``start_platform`` raises."""
    options.load.check()
    if options.setup is None and options.url is None:
        raise BadConfig("name a base model to start a platform for, or the URL of a running one", param="model")
    rounds: list[Round] = []
    for _ in range(options.starts):
        with ExitStack() as stack:
            session = None
            if options.setup is not None:
                say("loading the engine alone")
                session = BenchSession(_shared(options.setup))
                stack.callback(session.close)
            if options.url is not None:
                server = Server(url=options.url, targets=tuple(targets), cpu_seconds=dict)
            else:
                server = _start(options, session, stack, say)
            machine = _machine(session)
            measurement = _Measurement(options, requests, session, server, say)
            measurement.warm_up()
            rounds += [measurement.round(number) for number in range(options.rounds)]
    return ServeBenchResult(options=options, machine=machine, summary=summary_of(rounds), rounds=tuple(rounds))


def _shared(setup: EngineSetup) -> EngineSetup:
    """Threads and memory as the engine alone and the replica shall have them."""
    return msgspec.structs.replace(
        setup, threads=setup.threads or torch.get_num_threads(), memory_fraction=_MEMORY_FRACTION
    )


def _start(
    options: ServeBenchOptions, session: BenchSession | None, stack: ExitStack, say: Callable[[str], None]
) -> Server:
    # Ray is needed to start a platform, not to load one that runs.
    from loraplex_deployments.bench_platform import bench_platform
    from loraplex_deployments.bench_processes import cpu_seconds

    assert session is not None
    setup = msgspec.structs.replace(session.setup, num_pages=session.machine.num_pages)
    url, targets = stack.enter_context(bench_platform(options, setup, say))
    return Server(url=url, targets=targets, cpu_seconds=cpu_seconds)


class _Measurement:
    """Owns the seeds: no prompt comes twice."""

    def __init__(
        self,
        options: ServeBenchOptions,
        requests: RequestConfig,
        session: BenchSession | None,
        server: Server,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._requests = requests
        self._session = session
        self._server = server
        self._say = say
        self._seed = requests.seed

    def warm_up(self) -> None:
        """A turn of each that does not count. What runs at a size for the first time takes longer, on a GPU until the
        step's graph is captured; and requests that come through HTTP make steps of many sizes, while the engine alone
        gets the same ones in each turn."""
        self._engine_turn("warm-up")
        self._http_turn("warm-up")

    def round(self, number: int) -> Round:
        """Who begins changes from round to round."""
        name = f"round {number + 1}"
        engine = single_engine = None
        if number % 2 == 0:
            engine, single_engine = self._engine_turn(name)
        http, single_http = self._http_turn(name)
        if number % 2 == 1:
            engine, single_engine = self._engine_turn(name)
        return Round(engine=engine, http=http, single_engine=single_engine, single_http=single_http)

    def _single(self) -> EngineLoad:
        return msgspec.structs.replace(
            self._options.load, requests=self._options.single_ttft, concurrency=1, output_tokens=1
        )

    def _engine_turn(self, name: str) -> tuple[LoadResult | None, LoadResult | None]:
        session = self._session
        if session is None:
            return None, None
        result = session.run(self._options.load)
        self._say(f"{name}: engine alone {result.output_tokens_per_s:,.0f} tokens/s")
        return result, session.run(self._single()) if self._options.single_ttft else None

    def _http_turn(self, name: str) -> tuple[HttpTurn, LoadReport | None]:
        load = self._options.load
        num_targets = len(self._server.targets)
        # As the engine alone is warmed up: short requests, then one for each adapter, which brings it onto the device.
        self._send(msgspec.structs.replace(load, requests=_streams(load), output_tokens=_WARMUP_TOKENS))
        self._send(msgspec.structs.replace(load, requests=num_targets, input_tokens=1, output_tokens=1))
        turn = self._send(load)
        self._say(f"{name}: through HTTP {turn.report.output_tokens_per_s:,.0f} tokens/s")
        return turn, self._send(self._single()).report if self._options.single_ttft else None

    def _send(self, load: EngineLoad) -> HttpTurn:
        before: dict[str, float] = {}
        client_load = ClientLoad(
            url=self._server.url,
            config=self._requests,
            targets=self._server.targets,
            prompts=self._prompts(),
            num_requests=load.requests,
            streams=_streams(load),
            prompt_tokens=load.input_tokens,
            output_tokens=load.output_tokens,
        )
        run = run_clients(
            client_load,
            num_processes=self._options.client_processes,
            on_start=lambda: before.update(self._server.cpu_seconds()),
        )
        after = self._server.cpu_seconds()
        client_s = sum(run.cpu_s)
        report = summarize(run.samples, client_cpu_s=client_s)
        used_s = {role: seconds - before[role] for role, seconds in after.items()} | {"client": client_s}
        return HttpTurn(
            report=report,
            cpu={
                role: RoleCpu(
                    seconds=seconds,
                    cores=seconds / report.duration_s,
                    ms_per_token=1e3 * seconds / max(1, report.output_tokens),
                )
                for role, seconds in used_s.items()
                if seconds > 0
            },
            client_processes=len(run.cpu_s),
            busiest_client=max(run.cpu_s) / report.duration_s,
        )

    def _prompts(self) -> PromptMaker:
        self._seed += 1
        if self._options.url is not None and self._options.tokenizer is not None:
            return TokenizerPrompts(self._options.tokenizer, seed=self._seed)
        if self._session is not None and self._requests.endpoint is Endpoint.COMPLETIONS:
            return RandomTokens(self._session.executor.model.vocab_size, seed=self._seed)
        return WordPrompts(seed=self._seed)


def summary_of(rounds: Sequence[Round]) -> ServeSummary:
    """Of at least one round."""
    pairs = [(one.http.report, one.engine) for one in rounds]
    http_rates = [report.output_tokens_per_s for report, _ in pairs]
    engines = [engine for _, engine in pairs if engine is not None]
    singles = [(one.single_http, one.single_engine) for one in rounds if one.single_http is not None]
    errors: dict[str, int] = {}
    for report, _ in [*pairs, *singles]:
        for error, count in report.errors.items():
            errors[error] = errors.get(error, 0) + count
    return ServeSummary(
        http_tokens_per_s=statistics.median(http_rates),
        engine_tokens_per_s=statistics.median(e.output_tokens_per_s for e in engines) if engines else None,
        http_over_engine=(
            statistics.median(rate / e.output_tokens_per_s for rate, e in zip(http_rates, engines, strict=True))
            if engines
            else None
        ),
        ttft_ms=_compared(pairs, "ttft_s"),
        tpot_ms=_compared(pairs, "tpot_s"),
        single_ttft_ms=_compared(singles, "ttft_s"),
        cpu=_median_cpu([one.http.cpu for one in rounds]),
        busiest_client=max(one.http.busiest_client for one in rounds),
        errors=errors,
    )


def _compared(pairs: Sequence[tuple[LoadReport, LoadResult | None]], field: str) -> dict[str, Compared]:
    """Percentile -> milliseconds, of the rounds that have ``field``."""
    found: list[tuple[Latency, Any]] = [
        (getattr(report, field), None if engine is None else getattr(engine, field))
        for report, engine in pairs
        if getattr(report, field) is not None
    ]
    if not found:
        return {}
    table = {}
    for name in ("p50", "p90", "p99"):
        http = [1e3 * float(getattr(latency, name)) for latency, _ in found]
        engine = [1e3 * float(getattr(latency, name)) for _, latency in found if latency is not None]
        both = len(engine) == len(http)
        table[name] = Compared(
            http=statistics.median(http),
            engine=statistics.median(engine) if both else None,
            added=statistics.median(h - e for h, e in zip(http, engine, strict=True)) if both else None,
        )
    return table


def _median_cpu(turns: Sequence[dict[str, RoleCpu]]) -> dict[str, RoleCpu]:
    """Role -> medians over the rounds in which it used any; busiest first."""
    table = {}
    for role in {role for turn in turns for role in turn}:
        uses = [turn[role] for turn in turns if role in turn]
        table[role] = RoleCpu(
            seconds=statistics.median(use.seconds for use in uses),
            cores=statistics.median(use.cores for use in uses),
            ms_per_token=statistics.median(use.ms_per_token for use in uses),
        )
    return dict(sorted(table.items(), key=lambda item: -item[1].seconds))


def _machine(session: BenchSession | None) -> ServeMachine:
    return ServeMachine(
        device_name=None if session is None else session.machine.device_name,
        cores=os.cpu_count() or 1,
        num_pages=None if session is None else session.machine.num_pages,
        python_version=sys.version.split()[0],
        torch_version=str(torch.__version__),
        ray_version=version("ray"),
    )


def _streams(load: EngineLoad) -> int:
    return min(load.concurrency or load.requests, load.requests)
