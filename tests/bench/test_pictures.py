"""The committed results, and made-up ones, become pictures that say the figures of the files."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest
from loraplex.bench.cases import CASES
from loraplex.bench.options import EngineSetup
from loraplex.bench.peers import read_peers
from loraplex.bench.pictures import (
    EngineFigures,
    cases_table,
    cold_chart,
    eta_chart,
    lora_step_chart,
    many_chart,
    ranks_chart,
    sources_table,
    throughput_chart,
    tpot_chart,
    ttft_chart,
)
from loraplex.bench.results import Percentiles, SingleTtft, SweepSummary, SweepTable
from loraplex.core.errors import BadConfig

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "notebooks/data/engine_peers_h100.json"
SETUP = EngineSetup(model="random:llama3-8b")
SVG = "{http://www.w3.org/2000/svg}"


def _tips(picture: str) -> list[str]:
    return [title.text or "" for title in ElementTree.fromstring(picture).iter(f"{SVG}title")]


def _row(case: str, tokens_per_s: float) -> SweepSummary:
    return SweepSummary(
        case=case,
        rounds=1,
        adapters=CASES[case].adapters,
        requests=CASES[case].requests,
        lora_rank=16,
        output_tokens_per_s=tokens_per_s,
        ttft_ms=10.0,
        tpot_ms=tokens_per_s / 1000,
        eta=0.5,
        ratio=None,
    )


def _same(seconds: float) -> Percentiles:
    return Percentiles(mean=seconds, p50=seconds, p90=seconds, p99=seconds)


def _write(path: Path, *rows: SweepSummary, setup: EngineSetup = SETUP, **fields: object) -> None:
    table = SweepTable(setup=setup, commit=None, summary=list(rows), **({"shrink": 1} | fields))  # type: ignore[arg-type]
    path.write_bytes(msgspec.json.encode(table))


@pytest.fixture
def figures(tmp_path: Path) -> EngineFigures:
    ttft = SingleTtft(
        input_tokens=256, base_s=_same(0.009), warm_s=_same(0.012), cold_s=_same(0.0135), added_by_cold_s=0.0015
    )
    _write(tmp_path / "a.json", *(_row(case, 1000.0 + index) for index, case in enumerate(CASES)), single_ttft=ttft)
    _write(tmp_path / "b.json", _row("lora-32", 9000.0))
    return EngineFigures.read([tmp_path / "b.json", tmp_path / "a.json"], PEERS)


def test_each_picture_says_the_figures_of_its_cases(figures: EngineFigures) -> None:
    told = _tips(throughput_chart(figures))
    # The first file counts.
    assert {"Loraplex, base only: 1,000", "Loraplex, 32 adapters: 9,000", "vLLM 0.26, 256 adapters: 1,338"} <= set(told)
    assert "floor, 1 adapter: 11,400" in told
    assert {"Loraplex, 32 requests 32 adapters: 1.01", "vLLM 0.26, 64 requests base only: 7.8"} <= set(
        _tips(tpot_chart(figures))
    )
    assert {"Loraplex, adapter in host memory: 13.5", "vLLM 0.26, adapter on the GPU: 65"} <= set(
        _tips(ttft_chart(figures))
    )
    cold = _tips(cold_chart(figures))
    assert "vLLM 0.26, in host memory, 256 adapters: 713" in cold
    assert not any("floor" in tip for tip in cold)
    ranks = [float(tip.rsplit(" ", 1)[1].replace(",", "")) for tip in _tips(ranks_chart(figures))]
    assert ranks[-1] == pytest.approx(sum(ranks[:4]) / 4, abs=1)
    assert len(_tips(many_chart(figures))) == 4
    assert {tip.rsplit(" ", 1)[1] for tip in _tips(eta_chart(figures))} == {"0.5"}
    page = cases_table(figures)
    assert all(f"<td>{case}</td>" in page for case in CASES)
    assert "random:llama3-8b" in sources_table(figures)


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    _write(tmp_path / "a.json", _row("base", 1000.0))
    few = EngineFigures.read([tmp_path / "a.json"], PEERS)
    assert [tip for tip in _tips(throughput_chart(few)) if tip.startswith("Loraplex")] == ["Loraplex, base only: 1,000"]
    assert _tips(ranks_chart(few)) == []
    assert not any(tip.startswith("Loraplex") for tip in _tips(ttft_chart(few)))
    assert _tips(eta_chart(few)) == ["Loraplex, 256 requests base only: 0.5"]


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a.json", _row("base", 1000.0))
    _write(tmp_path / "b.json", _row("base", 1000.0), setup=EngineSetup(model="random:llama3-70b"))
    with pytest.raises(BadConfig, match=r"b\.json: .* not those of random:llama3-8b on cpu"):
        EngineFigures.read(sorted(tmp_path.glob("*.json")), PEERS)
    _write(tmp_path / "b.json", _row("base", 1000.0), shrink=64)
    with pytest.raises(BadConfig, match="shrunk"):
        EngineFigures.read(sorted(tmp_path.glob("*.json")), PEERS)
    for other in ({"tp": 2}, {"pp": 2}, {"batch_invariant": True}):
        _write(tmp_path / "b.json", _row("base", 1000.0), setup=msgspec.structs.replace(SETUP, **other))
        with pytest.raises(BadConfig, match="not those of"):
            EngineFigures.read(sorted(tmp_path.glob("*.json")), PEERS)
    (tmp_path / "b.json").write_text("{}")
    for read in (lambda: EngineFigures.read([tmp_path / "b.json"], PEERS), lambda: read_peers(tmp_path / "b.json")):
        with pytest.raises(BadConfig, match=r"b\.json: not "):
            read()
    with pytest.raises(BadConfig, match="not the results of bench_lora"):
        lora_step_chart(tmp_path / "b.json")
    with pytest.raises(BadConfig, match="no table"):
        EngineFigures.read([], PEERS)


def test_the_committed_files_are_read() -> None:
    """Those of the peers, whose cases are ours, and those of the GPU."""
    assert {row.case for peer in read_peers(PEERS).peers for row in peer.rows} <= set(CASES)
    figures = EngineFigures.read(
        [ROOT / "notebooks/results/engine_h100.json", ROOT / "notebooks/results/engine_wide_h100.json"], PEERS
    )
    assert "H100" in figures.device
    assert any(tip.startswith("Loraplex, 256 adapters") for tip in _tips(throughput_chart(figures)))
    file = ROOT / "kernels/benchmarks/results/lora_decode_h100.json"
    measured = {case["case"]: case["added_ms_chosen"] for case in json.loads(file.read_bytes())["cases"]}
    tips = _tips(lora_step_chart(file))
    assert f"added by LoRA, 256x256: {measured['256x256']:.3g}" in tips
    assert not any("r8" in tip for tip in tips)
