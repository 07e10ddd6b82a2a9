"""Runs a prepared experiment: for each layout its replicas, once; then cell after cell, a row of the results for each.

Called by ``__main__`` and the command ``bench fleet``.
"""

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from loraplex.bench.commit import source_commit
from loraplex.bench.fleet.client import RouterClient
from loraplex.bench.fleet.prepared import LONE_TOKENS, Cell, PreparedFleet, Workload, groups_line, lone_requests
from loraplex.bench.fleet.replicas import FleetReplicas, adapter_ranks, layout_of
from loraplex.bench.fleet.results import (
    ALL,
    Figure,
    FleetRow,
    FleetTable,
    Lateness,
    figures_of,
    good_requests,
    seconds_of,
    step_totals,
)
from loraplex.bench.random_adapters import random_manifests
from loraplex.bench.whole_file import write_whole
from loraplex.core.errors import BadConfig, LoraplexError
from loraplex.core.ids import BaseModelId, Digest, GatewayId
from loraplex.loadgen.completion import Sample
from loraplex.loadgen.open_loop import run_open_loop
from loraplex.loadgen.outcomes import Outcomes
from loraplex.loadgen.prompts import RandomTokens
from loraplex.model_runner.build import load_model_spec
from loraplex.router.config import RouterConfig
from loraplex.router.router import Router
from loraplex.traces.arrivals import Arrivals

_UP_S = 60.0
_LOOK_S = 0.02
_SLACK_S = 120.0
"""A run may take so much longer than its arrivals."""
_LONE = 8
_LONE_GAP_S = 0.15
_WAVES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Requests at once, per replica, that a fresh layout answers before anything counts."""
_WHOLE_PROMPTS = 8
"""Requests of smaller waves have the workload's prompts, those of others no more than ``_SHORT_PROMPT`` tokens."""
_SHORT_PROMPT = 128
_WAVE_OUTPUT = 12

Say = Callable[[str], None]


class MeasureOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    workloads: tuple[str, ...] = ()
    """None given: all."""
    placements: tuple[str, ...] = ()
    """Cells of which one is among these; none given: all."""
    budget_s: float | None = None
    """No cell starts that would not end within this after the start, if it takes beside its arrivals what others took:
    of the first nothing is known."""
    largest_wave: Annotated[int, msgspec.Meta(ge=1)] = 64
    """Requests at once, per replica, that a fresh layout warms up with."""
    waves: Annotated[int, msgspec.Meta(ge=1)] = 3
    """Of each size: kernels are compiled, and graphs captured where one comes again that no wider graph serves."""
    steps_to: str | None = None
    """Folder that gets the steps of each cell as its replicas ran them, a file a cell; its row then tells what they
    took beside what the profile says of them. None: steps are not recorded."""


def measure(prepared: PreparedFleet, out: Path, options: MeasureOptions, *, say: Say) -> FleetTable:
    """Runs what ``out`` does not hold yet. BadConfig (unknown workload; ``out`` is of another experiment; no folder for
    the steps; options of a replica); LoraplexError when a replica ends."""
    budget = _Budget(options.budget_s)
    if options.steps_to is not None:
        try:
            Path(options.steps_to).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadConfig(f"{options.steps_to}: {error.strerror}", param="steps_to") from error
    table = FleetTable.open(out, prepared)
    table.left = []
    with tempfile.TemporaryDirectory(prefix="loraplex-fleet-") as folder:
        profile = Path(folder) / "profile.json"
        profile.write_bytes(prepared.profile.to_json())
        for cells in _by_layout(prepared, options, table):
            if not budget.holds(prepared.workloads[cells[0].workload], fresh=True):
                table.left += map(_label, cells)
                continue
            say(f"{groups_line(cells[0].plan)}: starting")
            begun_s = time.monotonic()
            with FleetReplicas(prepared.experiment, cells[0], record_steps=options.steps_to is not None) as replicas:
                start_s = time.monotonic() - begun_s
                say(f"replicas are up after {start_s:.1f} s")
                for number, cell in enumerate(cells):
                    workload, fresh = prepared.workloads[cell.workload], number == 0
                    if not fresh and not budget.holds(workload, fresh=False):
                        table.left.append(_label(cell))
                        continue
                    begun_s = time.monotonic()
                    row = asyncio.run(_Run(prepared, cell, replicas, profile, options, say=say).row(fresh=fresh))
                    table.rows.append(row)
                    table.write(out)
                    budget.took(time.monotonic() - begun_s, workload, start_s=start_s if fresh else None)
                    for line in row_lines(row):
                        say(line)
    table.write(out)
    return table


def row_lines(row: FleetRow) -> list[str]:
    """A line for each base and one for all: measured / predicted."""
    lines = [
        f"{row.workload}, {', '.join(row.placements)} ({row.groups}): {row.requests} requests, "
        f"{row.unanswered} unanswered; sent late by {row.lateness.p99_ms:.1f} ms (p99); beside its step a first token "
        f"takes {', '.join(f'{1e3 * added_s:.1f} ms ({base})' for base, added_s in row.overhead_s.items())}"
    ]
    lines += [f"  {times} failed: {message}" for message, times in row.errors.items()]
    for base, totals in row.steps.items():
        parts = [_pair(f"{total.steps} {kind} in", total.time_s, 1.0, "{:.2f}") for kind, total in totals.items()]
        lines.append(f"  steps of {base}: {' s, '.join(parts)} s")
    names = [name for name in row.figures if name != ALL]
    for name in names if len(names) == 1 else [*names, ALL]:
        figures = row.figures[name]
        parts = [
            _pair("attainment", figures["attainment"], 1.0, "{:.3f}"),
            *(
                _pair(label, figures[key], 1e3, "{:.1f}")
                for label, key in (
                    ("TTFT mean", "ttft_mean_s"),
                    ("p50", "ttft_p50_s"),
                    ("p99", "ttft_p99_s"),
                    ("TPOT p50", "tpot_p50_s"),
                )
            ),
        ]
        lines.append(f"  {name}: {', '.join(parts)} ms")
    return lines


class _Run:
    """One cell on running replicas."""

    _numbers = count(1)

    def __init__(
        self,
        prepared: PreparedFleet,
        cell: Cell,
        replicas: FleetReplicas,
        profile: Path,
        options: MeasureOptions,
        *,
        say: Say,
    ) -> None:
        self._prepared, self._cell, self._replicas, self._options = prepared, cell, replicas, options
        self._profile = profile
        self._workload: Workload = prepared.workloads[cell.workload]
        self._say = say
        self._models = {
            base.name: load_model_spec(base.model, BaseModelId(base.name)) for base in prepared.experiment.bases
        }
        self._prompts = RandomTokens(
            min(model.vocab_size for model in self._models.values()), seed=prepared.experiment.seed
        )
        self._digests = self._digests_of_adapters()

    async def row(self, *, fresh: bool) -> FleetRow:
        """``fresh``: the replicas have served nothing yet."""
        cell, workload, experiment = self._cell, self._workload, self._prepared.experiment
        begun_s = time.monotonic()
        staged = await asyncio.to_thread(self._replicas.stage, cell, workload)
        if staged:
            self._say(f"{staged} adapters staged in {time.monotonic() - begun_s:.1f} s")
        arrivals = workload.arrivals
        router = await self._router()
        try:
            if fresh:
                begun_s = time.monotonic()
                await self._warm_up(router, arrivals)
                self._say(f"warmed up in {time.monotonic() - begun_s:.1f} s")
            overhead_s = await self._overhead_s(router)
        finally:
            await router.close()
        await asyncio.to_thread(self._replicas.take_steps, cell, workload)
        # One that has learned nothing, as the simulated one.
        router = await self._router()
        try:
            samples = await self._send(router, arrivals, self._digests)
        finally:
            await router.close()
        self._replicas.check()
        steps = await asyncio.to_thread(self._replicas.take_steps, cell, workload)
        if self._options.steps_to is not None:
            name = f"{cell.workload} {cell.placements[0]}".replace(" ", "-")
            write_whole(Path(self._options.steps_to) / f"{name}.json", msgspec.json.encode(steps))
        outcomes = Outcomes.of_samples(samples)
        counted = outcomes.at_s >= workload.counts_from_s
        late_ms = 1e3 * np.array([max(0.0, sample.sent_s - sample.scheduled_s) for sample in samples])[counted]
        return FleetRow(
            workload=cell.workload,
            placements=cell.placements,
            settings=cell.settings,
            groups=groups_line(cell.plan),
            load=workload.load,
            requests=int(np.count_nonzero(counted)),
            unanswered=int(np.count_nonzero(counted & ~outcomes.served)),
            errors=Counter(
                sample.message for sample, counts in zip(samples, counted, strict=True) if counts and sample.error
            ),
            commit=source_commit(),
            device_name=f"{experiment.gpus} x {self._replicas.device_name}",
            torch_version=self._replicas.torch_version,
            overhead_s=overhead_s,
            lateness=Lateness(
                p50_ms=float(np.percentile(late_ms, 50)),
                p99_ms=float(np.percentile(late_ms, 99)),
                max_ms=float(late_ms.max()),
            ),
            figures=figures_of(self._prepared, cell, outcomes, overhead_s),
            ttft_s=seconds_of(outcomes.ttft_s, counted),
            tpot_s=seconds_of(outcomes.tpot_s, counted),
            steps=step_totals(self._prepared, self._replicas.routes(cell), steps),
            good="".join("01"[met] for met in good_requests(self._prepared, cell, outcomes)[counted].astype(int)),
        )

    async def _router(self) -> Router:
        """Connected to all replicas."""
        # Replicas tell gateways apart by their ids.
        gateway_id = GatewayId(f"fleet-{next(self._numbers)}")
        router = Router(gateway_id=gateway_id, config=RouterConfig(profiles=(str(self._profile),)))
        routes = self._replicas.routes(self._cell)
        router.update(routes, self._replicas.secret)
        until_s = time.monotonic() + _UP_S
        while len(router.loads()) < len(routes):
            if time.monotonic() > until_s:
                await router.close()
                raise LoraplexError("not all replicas answer")
            await asyncio.sleep(_LOOK_S)
        return router

    async def _warm_up(self, router: Router, arrivals: Arrivals) -> None:
        """Waves of the workload's own requests, shortened; all bases at once."""
        await asyncio.gather(
            *(self._warm_up_base(router, arrivals, index) for index in range(len(arrivals.base_models)))
        )

    async def _warm_up_base(self, router: Router, arrivals: Arrivals, index: int) -> None:
        random = np.random.default_rng(index)
        base = arrivals.base_models[index]
        own = np.flatnonzero(arrivals.base_model == index)
        hosts = sum(placed.base_model_id == base for group in self._cell.plan.groups for placed in group.bases)
        if not len(own) or not hosts:
            return
        for size in (size for size in _WAVES if size <= self._options.largest_wave):
            for _ in range(self._options.waves):
                rows = random.choice(own, size=size * hosts)
                most = int(arrivals.prompt_tokens.max()) if size <= _WHOLE_PROMPTS else _SHORT_PROMPT
                wave = replace(
                    arrivals,
                    arrival_s=np.zeros(len(rows)),
                    adapter=arrivals.adapter[rows],
                    base_model=arrivals.base_model[rows],
                    tenant=arrivals.tenant[rows],
                    prompt_tokens=np.minimum(arrivals.prompt_tokens[rows], most),
                    output_tokens=random.integers(2, _WAVE_OUTPUT + 1, size=len(rows), dtype=np.int32),
                )
                await self._answered(router, wave, self._digests)

    async def _overhead_s(self, router: Router) -> dict[str, float]:
        """By base: the median over lone requests of what the first token takes more than predicted."""
        predicted_s = self._cell.lone_ttft_s
        bases = tuple(BaseModelId(base) for base in predicted_s)
        prompt, output = LONE_TOKENS
        lone = lone_requests(bases, count=_LONE, gap_s=_LONE_GAP_S, prompt_tokens=prompt, output_tokens=output)
        first_s = Outcomes.of_samples(await self._answered(router, lone, ())).ttft_s
        return {
            str(base): max(0.0, float(np.median(first_s[index :: len(bases)])) - predicted_s[base])
            for index, base in enumerate(bases)
        }

    async def _answered(self, router: Router, arrivals: Arrivals, digests: Sequence[Digest]) -> list[Sample]:
        """LoraplexError when one is not answered."""
        samples = await self._send(router, arrivals, digests)
        failed = next((sample for sample in samples if sample.error is not None), None)
        if failed is not None:
            self._replicas.check()
            raise LoraplexError(f"a request of the warm-up failed: {failed.message}")
        return samples

    async def _send(self, router: Router, arrivals: Arrivals, digests: Sequence[Digest]) -> list[Sample]:
        """In the order of ``arrivals``. LoraplexError when the answers do not come."""
        client = RouterClient(router, arrivals, digests, run=f"run{next(self._numbers)}")
        allowed_s = float(arrivals.arrival_s[-1]) + _SLACK_S
        try:
            async with asyncio.timeout(allowed_s):
                await run_open_loop(client.schedule(), client, self._prompts)
        except TimeoutError:
            self._replicas.check()
            raise LoraplexError(f"requests had no end after {allowed_s:.0f} s") from None
        return [client.samples[row] for row in range(len(arrivals))]

    def _digests_of_adapters(self) -> list[Digest]:
        """Of the workload's adapters, as the replicas have them."""
        workload = self._workload
        by_base = {}
        for base, model in self._models.items():
            ranks = adapter_ranks(workload, base)
            by_base[base] = iter(random_manifests(model, count=len(ranks), lora_ranks=ranks) if ranks else ())
        return [next(by_base[base]).digest for _, base, _, _ in workload.adapters]


def _by_layout(prepared: PreparedFleet, options: MeasureOptions, table: FleetTable) -> list[list[Cell]]:
    """What is to be run; cells that the same replicas serve are together."""
    if unknown := sorted(set(options.workloads) - prepared.workloads.keys()):
        raise BadConfig(
            f"workload {unknown[0]!r} is not prepared (there are: {', '.join(prepared.workloads)})", param="workloads"
        )
    known = {name for cell in prepared.cells for name in cell.placements}
    if unknown := sorted(set(options.placements) - known):
        raise BadConfig(
            f"placement {unknown[0]!r} is not prepared (there are: {', '.join(sorted(known))})", param="placements"
        )
    found: dict[object, list[Cell]] = {}
    for cell in prepared.cells:
        wanted = not options.workloads or cell.workload in options.workloads
        wanted &= not options.placements or bool(set(cell.placements) & set(options.placements))
        if wanted and not table.holds(cell):
            found.setdefault(layout_of(cell), []).append(cell)
    return list(found.values())


class _Budget:
    def __init__(self, budget_s: float | None) -> None:
        self._budget_s = budget_s
        self._started_s = time.monotonic()
        self._start_s = 0.0
        """The longest that replicas took to start."""
        self._fresh_s = 0.0
        """The longest that a cell took beside its arrivals on replicas that had just started: they warm up."""
        self._used_s: float | None = None
        """And on others; None: there was none."""

    def holds(self, workload: Workload, *, fresh: bool) -> bool:
        """``fresh``: its replicas are still to be started."""
        used_s = self._fresh_s if self._used_s is None else self._used_s
        takes_s = workload.arrival_s[-1] + (self._start_s + self._fresh_s if fresh else used_s)
        return self._budget_s is None or time.monotonic() - self._started_s + takes_s <= self._budget_s

    def took(self, seconds: float, workload: Workload, *, start_s: float | None) -> None:
        """``start_s``: of its replicas before; None: they were not fresh."""
        beside_s = seconds - workload.arrival_s[-1]
        if start_s is None:
            self._used_s = max(self._used_s or 0.0, beside_s)
        else:
            self._start_s, self._fresh_s = max(self._start_s, start_s), max(self._fresh_s, beside_s)


def _label(cell: Cell) -> str:
    return f"{cell.workload}: {', '.join(cell.placements)}"


def _pair(label: str, figure: Figure, scale: float, form: str) -> str:
    sides = ["-" if side is None else form.format(scale * side) for side in (figure.measured, figure.predicted)]
    difference = ""
    if figure.difference is not None:
        points = label == "attainment"
        difference = f" ({100 * figure.difference:+.1f}{' points' if points else '%'})"
    return f"{label} {sides[0]} / {sides[1]}{difference}"
