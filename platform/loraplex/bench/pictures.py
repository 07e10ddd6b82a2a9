"""The tables of sweeps as pictures, beside what others reach on the same loads. Pure but for reading the files.

Pictures are SVG elements, tables HTML; a figure that no file has is left out of them. Called by notebooks.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import msgspec

from loraplex.bench.cases import CASES
from loraplex.bench.peers import Peer, read_peers
from loraplex.bench.results import SingleTtft, SweepSummary, SweepTable
from loraplex.core.errors import BadConfig
from loraplex.pages.grouped_bars import Bars, grouped_bars
from loraplex.pages.page import table

_OURS = "Loraplex"
_BY_ADAPTERS = {
    "base": "base only",
    "base-lora-32-idle": "32 adapters, unused",
    "lora-1": "1 adapter",
    "lora-32": "32 adapters",
    "lora-256": "256 adapters",
}
_BY_REQUESTS = {
    "1-base": "1 request\nbase only",
    "1-lora-1": "1 request\n1 adapter",
    "32-base": "32 requests\nbase only",
    "32-lora-1": "32 requests\n1 adapter",
    "32-lora-32": "32 requests\n32 adapters",
    "64-base": "64 requests\nbase only",
    "64-lora-32": "64 requests\n32 adapters",
}
_RANKS = {"rank-8": "rank 8", "rank-16": "rank 16", "rank-32": "rank 32", "rank-64": "rank 64"}
_MIXED = "rank-mixed"
_TTFT = {"base": "base only", "warm": "adapter on the GPU", "cold": "adapter in host memory"}

Figure = Literal["output_tokens_per_s", "tpot_ms", "eta"]


class _LoraCase(msgspec.Struct, frozen=True, kw_only=True):
    case: str
    base_ms: float
    floor_ms: float
    added_ms_chosen: float


class _LoraResults(msgspec.Struct, frozen=True, kw_only=True):
    gpu: str
    cases: tuple[_LoraCase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """Of one model on one device."""

    model: str
    device: str
    cases: Mapping[str, SweepSummary]
    single_ttft: SingleTtft | None
    work: str
    peers: tuple[Peer, ...]

    @classmethod
    def read(cls, tables: Iterable[Path], peers: Path) -> Self:
        """``tables``: files of ``loraplex bench sweep``; a case that several have is that of the first. BadConfig
        naming a file that is none, is shrunk, or is of another model, device, shape or mode."""
        kept = [(path, _table(path)) for path in tables]
        if not kept:
            raise BadConfig("there is no table of a sweep to read")
        cases: dict[str, SweepSummary] = {}
        for path, one in kept:
            if one.shrink != 1 or _kind(one) != _kind(kept[0][1]):
                raise BadConfig(f"{path}: its loads are shrunk, or not those of {' on '.join(_origin(kept[0][1]))}")
            for row in one.summary:
                cases.setdefault(row.case, row)
        model, device = _origin(kept[0][1])
        told = read_peers(peers)
        return cls(
            model=model,
            device=device,
            cases=cases,
            single_ttft=next((one.single_ttft for _, one in kept if one.single_ttft is not None), None),
            work=told.work,
            peers=told.peers,
        )

    def of(self, case: str, figure: Figure) -> float:
        """NaN where it was not measured."""
        row = self.cases.get(case)
        value = None if row is None else getattr(row, figure)
        return math.nan if value is None else float(value)


def throughput_chart(figures: EngineFigures) -> str:
    """Tokens per second of 256 requests by the number of their adapters."""
    return _chart(
        figures, _BY_ADAPTERS, "output_tokens_per_s", y_label="output tokens/s", x_label="256 requests at once"
    )


def tpot_chart(figures: EngineFigures) -> str:
    """Time per output token by requests and adapters."""
    return _chart(figures, _BY_REQUESTS, "tpot_ms", y_label="TPOT, ms")


def ttft_chart(figures: EngineFigures) -> str:
    """Time to first token of a lone request."""
    ours = figures.single_ttft
    found = [] if ours is None else [1e3 * one.p50 for one in (ours.base_s, ours.warm_s, ours.cold_s)]
    sides = [Bars(name=_OURS, values=found or [math.nan] * len(_TTFT))]
    sides += [
        Bars(name=peer.name, values=[peer.single_ttft_ms.get(kind, math.nan) for kind in _TTFT])
        for peer in figures.peers
    ]
    return grouped_bars([*_TTFT.values()], sides, y_label="TTFT, ms", x_label="one request of 256 tokens")


def cold_chart(figures: EngineFigures) -> str:
    """Tokens per second with all adapters on the GPU at the start, and with none."""
    adapters = ("32", "256")
    sides = [
        Bars(name=f"{name}, {words}", values=[rates.get(f"{kind}-{number}", math.nan) for number in adapters])
        for name, rates in _rates(figures).items()
        for kind, words in (("lora", "adapters on the GPU"), ("cold", "in host memory"))
        if any(f"cold-{number}" in rates for number in adapters)
    ]
    return grouped_bars([f"{number} adapters" for number in adapters], sides, y_label="output tokens/s")


def ranks_chart(figures: EngineFigures) -> str:
    """Tokens per second by the rank of 64 adapters, and with all ranks in one batch."""
    single = [figures.of(case, "output_tokens_per_s") for case in _RANKS]
    nothing = [math.nan] * len(_RANKS)
    sides = [
        Bars(name=_OURS, values=[*single, figures.of(_MIXED, "output_tokens_per_s")]),
        Bars(name="mean of the four", values=[*nothing, statistics.fmean(single)]),
    ]
    groups = [*_RANKS.values(), "a quarter of each"]
    return grouped_bars(groups, sides, y_label="output tokens/s", x_label="64 requests over 64 adapters")


def many_chart(figures: EngineFigures) -> str:
    """Tokens per second with few adapters and with thousands, which all fit or do not."""
    sides = [
        Bars(name=words, values=[figures.of(f"many-{number}{kind}", "output_tokens_per_s") for number in (5, 2000)])
        for kind, words in (("", "all adapters fit"), ("-capped", "6 GB for adapters"))
    ]
    groups = ["5 adapters", "2,000 adapters"]
    return grouped_bars(groups, sides, y_label="output tokens/s", x_label="4,000 requests, 256 at a time, rank 8")


def eta_chart(figures: EngineFigures) -> str:
    """The ideal time of a load's steps over their measured time."""
    named = {case: f"256 requests\n{words}" for case, words in _BY_ADAPTERS.items()} | _BY_REQUESTS
    return _chart(figures, named, "eta", y_label="eta", y_high=1.0)


def lora_step_chart(results: Path) -> str:
    """What adapters of rank 16 add to a decode step. ``results``: what ``kernels/benchmarks/bench_lora.py`` found."""
    try:
        read = msgspec.json.decode(results.read_bytes(), type=_LoraResults)
    except (OSError, msgspec.DecodeError) as error:
        raise BadConfig(f"{results}: not the results of bench_lora.py: {error}") from error
    # ROWSxADAPTERS; other ranks come behind.
    sizes = {tuple(int(part) for part in one.case.split("x")): one for one in read.cases if "r" not in one.case}
    ordered = [sizes[size] for size in sorted(sizes)]
    sides = [
        Bars(name="added by LoRA", values=[one.added_ms_chosen for one in ordered]),
        Bars(name="reading the adapters once", values=[one.floor_ms for one in ordered]),
        Bars(name="the step without LoRA", values=[one.base_ms for one in ordered]),
    ]
    groups = [one.case for one in ordered]
    return grouped_bars(groups, sides, y_label="ms a step", x_label=f"rows x adapters, {read.gpu}")


def cases_table(figures: EngineFigures) -> str:
    """All cases, with the tokens per second of the others."""
    rates = _rates(figures)
    others = [peer.name for peer in figures.peers]
    rows = [
        [
            row.case,
            row.requests,
            row.adapters,
            row.lora_rank or None,
            round(row.output_tokens_per_s),
            *(rates[name].get(row.case) for name in others),
            row.ttft_ms,
            row.tpot_ms,
            row.eta,
            row.rounds,
        ]
        for row in figures.cases.values()
    ]
    columns = ["case", "requests", "adapters", "rank", f"{_OURS} tokens/s", *others, "TTFT ms", "TPOT ms", "eta"]
    return table([*columns, "rounds"], rows)


def sources_table(figures: EngineFigures) -> str:
    """Where the figures of each side come from."""
    own = f"`loraplex bench sweep` of {figures.model} on {figures.device}; medians over the rounds"
    return table(["", "from"], [["work", figures.work], [_OURS, own], *([p.name, p.source] for p in figures.peers)])


def _chart(
    figures: EngineFigures,
    cases: Mapping[str, str],
    figure: Figure,
    *,
    y_label: str,
    x_label: str = "",
    y_high: float | None = None,
) -> str:
    """``cases``: name -> what the picture calls it. Sides and cases without such a figure are left out."""
    sides = {_OURS: {case: figures.of(case, figure) for case in cases}}
    sides |= {peer.name: _of_peer(peer, cases, figure) for peer in figures.peers}
    shown = [case for case in cases if any(math.isfinite(values[case]) for values in sides.values())]
    bars = [
        Bars(name=name, values=[values[case] for case in shown])
        for name, values in sides.items()
        if any(math.isfinite(values[case]) for case in shown)
    ]
    return grouped_bars([cases[case] for case in shown], bars, y_label=y_label, x_label=x_label, y_high=y_high)


def _of_peer(peer: Peer, cases: Iterable[str], figure: Figure) -> dict[str, float]:
    told = {row.case: getattr(row, figure, None) for row in peer.rows}
    found = {case: told.get(case) for case in cases}
    return {case: math.nan if value is None else float(value) for case, value in found.items()}


def _rates(figures: EngineFigures) -> dict[str, dict[str, float]]:
    """Side -> case -> tokens per second."""
    ours = {case: row.output_tokens_per_s for case, row in figures.cases.items()}
    return {_OURS: ours} | {
        peer.name: {row.case: row.output_tokens_per_s for row in peer.rows if row.output_tokens_per_s is not None}
        for peer in figures.peers
    }


def _table(path: Path) -> SweepTable:
    read = SweepTable.load(path)
    unknown = [row.case for row in read.summary if row.case not in CASES]
    if unknown:
        raise BadConfig(f"{path}: no case is called {unknown[0]!r}")
    return read


def _origin(read: SweepTable) -> tuple[str, str]:
    return read.setup.model, read.setup.device if read.machine is None else read.machine.device_name


def _kind(read: SweepTable) -> tuple[object, ...]:
    """What tables must share to stand in one picture."""
    return *_origin(read), read.setup.shape, read.setup.batch_invariant
