"""Every public format to ours: the rows that the source has, and one clear line for what it should not have."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.core.errors import BadConfig, InvalidInput, NotFound
from loraplex.traces.arrivals import Arrivals, Window, read_arrivals
from loraplex.traces.convert import raw
from loraplex.traces.convert.convert import ConvertOptions, convert
from loraplex.traces.convert.counts import Spread
from loraplex.traces.convert.mapping import MappingStrategy

DATA = Path(__file__).parents[1] / "data"
PUBLIC = DATA / "public"
MAF = PUBLIC / "maf2019_minutes.parquet"


def _converted(source: Path, out: Path, **options: object) -> tuple[str, Arrivals]:
    result = convert(str(source), out, ConvertOptions(**options))  # type: ignore[arg-type]
    arrivals = read_arrivals(out)
    assert len(arrivals) == result.rows
    return result.format, arrivals


def _names(arrivals: Arrivals) -> list[str | None]:
    return [arrivals.adapters[i].name if i >= 0 else None for i in arrivals.adapter]


def test_azure_llm(tmp_path: Path) -> None:
    name, arrivals = _converted(PUBLIC / "azure_llm_2023_conv.csv", tmp_path / "x.parquet")
    assert (name, len(arrivals)) == ("azure-llm", 60)
    assert arrivals.arrival_s[:3] == pytest.approx([0, 4.314579, 4.541877], abs=1e-6)
    assert arrivals.prompt_tokens[:3].tolist() == [374, 396, 879]
    assert arrivals.output_tokens[:3].tolist() == [44, 109, 55]


def test_zones(tmp_path: Path) -> None:
    lines = ["2024-05-10 00:00:00+00:00,1,1", "2024-05-10 02:00:01.5+02:00,2,2", "2024-05-10T00:00:03Z,3,3"]
    (tmp_path / "x.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines))
    assert _converted(tmp_path / "x.csv", tmp_path / "x.parquet")[1].arrival_s.tolist() == [0, 1.5, 3]


def test_mooncake(tmp_path: Path) -> None:
    name, arrivals = _converted(PUBLIC / "mooncake_conversation.jsonl", tmp_path / "x.parquet")
    rows = [json.loads(line) for line in (PUBLIC / "mooncake_conversation.jsonl").read_text().splitlines()]
    assert name == "mooncake"
    assert arrivals.arrival_s.tolist() == [row["timestamp"] / 1000 for row in rows]
    assert arrivals.prompt_tokens.tolist() == [row["input_length"] for row in rows]


def test_burstgpt_compressed(tmp_path: Path) -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
    )
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress((text + "45,GPT-4,417,276,693,API log\n").encode()))
    name, arrivals = _converted(tmp_path / "x.csv.gz", tmp_path / "x.parquet")
    assert (name, _names(arrivals)) == ("burstgpt", ["ChatGPT", "GPT-4"])
    assert (arrivals.arrival_s.tolist(), arrivals.output_tokens.tolist()) == ([5, 45], [18, 276])


def test_alpaserve_times_keep_their_bits(tmp_path: Path) -> None:
    source = pq.read_table(PUBLIC / "alpaserve_gamma_n8_r20_cv4.parquet")
    name, arrivals = _converted(PUBLIC / "alpaserve_gamma_n8_r20_cv4.parquet", tmp_path / "x.parquet")
    assert name == "alpaserve"
    assert np.array_equal(arrivals.arrival_s, source.column("t").to_numpy())
    assert _names(arrivals) == [f"m{index}" for index in source.column("model").to_pylist()]


def test_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "BATCH_ROWS", 7)
    np.savez_compressed(
        tmp_path / "x.npz",
        timestamp_s=np.arange(20) / 4,
        adapter=np.array([f"a{i % 3}" for i in range(20)]),
        prompt_tokens=np.arange(1, 21, dtype=">i8"),
    )
    name, arrivals = _converted(tmp_path / "x.npz", tmp_path / "x.parquet")
    assert name == "public"
    assert arrivals.arrival_s.tolist() == [i / 4 for i in range(20)]
    assert _names(arrivals) == [f"a{i % 3}" for i in range(20)]
    assert arrivals.prompt_tokens.tolist() == list(range(1, 21))


def test_our_own_files(tmp_path: Path) -> None:
    name, arrivals = _converted(DATA / "lmsys_arena_200.parquet", tmp_path / "x.parquet", speed=2.0, base_model="m")
    before = read_arrivals(DATA / "lmsys_arena_200.parquet")
    assert name == "trace"
    assert np.array_equal(arrivals.arrival_s, before.arrival_s / 2)
    assert {adapter.base_model for adapter in arrivals.adapters} == {"m"}
    assert np.array_equal(arrivals.prompt_tokens, before.prompt_tokens)


def test_maf_minutes_keep_their_counts(tmp_path: Path) -> None:
    name, arrivals = _converted(MAF, tmp_path / "x.parquet")
    assert name == "maf-minutes"
    counts: dict[tuple[str, int], int] = {}
    for adapter, at_s in zip(_names(arrivals), arrivals.arrival_s.tolist(), strict=True):
        key = (str(adapter), int(at_s // 60))
        counts[key] = counts.get(key, 0) + 1
    assert counts == {(row["function"], row["minute"]): row["count"] for row in pq.read_table(MAF).to_pylist()}
    owners = {row["function"]: row["owner"] for row in pq.read_table(MAF).to_pylist()}
    assert all(owners[adapter.name] == adapter.tenant for adapter in arrivals.adapters)


def test_maf_day_is_the_same_in_other_columns(tmp_path: Path) -> None:
    rows = pq.read_table(MAF).to_pylist()
    functions = list(dict.fromkeys(row["function"] for row in rows))
    counts = {(row["function"], row["minute"]): row["count"] for row in rows}
    about = {row["function"]: row for row in rows}
    lines = ["HashOwner,HashApp,HashFunction,Trigger," + ",".join(str(minute) for minute in range(1, 1441))]
    for name in functions:
        minutes = ",".join(str(counts.get((name, minute), 0)) for minute in range(1440))
        lines.append(f"{about[name]['owner']},{about[name]['app']},{name},{about[name]['trigger']},{minutes}")
    (tmp_path / "day.csv").write_text("\n".join(lines) + "\n")
    assert _converted(tmp_path / "day.csv", tmp_path / "day.parquet", format="maf-day", seed=5)[0] == "maf-day"
    _converted(MAF, tmp_path / "minutes.parquet", seed=5)
    day, minutes_ = read_arrivals(tmp_path / "day.parquet"), read_arrivals(tmp_path / "minutes.parquet")
    assert np.array_equal(day.arrival_s // 60, minutes_.arrival_s // 60)
    assert sorted(map(str, _names(day))) == sorted(map(str, _names(minutes_)))


def test_triggers_and_window_and_scale(tmp_path: Path) -> None:
    rows = pq.read_table(MAF).to_pylist()
    timers = {row["function"] for row in rows if row["trigger"] == "timer"}
    _, arrivals = _converted(MAF, tmp_path / "x.parquet", exclude_triggers=("timer",))
    assert timers
    assert set(_names(arrivals)) == {row["function"] for row in rows} - timers
    _, arrivals = _converted(MAF, tmp_path / "x.parquet", window=Window(600, 1200))
    assert len(arrivals) == sum(row["count"] for row in rows if 10 <= row["minute"] < 20)
    assert arrivals.arrival_s.max() < 600
    _, arrivals = _converted(MAF, tmp_path / "x.parquet", count_scale=40.5)
    assert len(arrivals) == pytest.approx(40.5 * sum(row["count"] for row in rows), rel=0.01)


def test_gamma_spread_is_burstier(tmp_path: Path) -> None:
    options = {"spread": Spread.GAMMA, "count_scale": 1000.0}
    cvs = []
    for cv in (1.0, 4.0):
        _, arrivals = _converted(MAF, tmp_path / "x.parquet", cv=cv, **options)
        assert len(arrivals) == pytest.approx(170_000, rel=0.05)
        busiest = arrivals.adapter == np.bincount(arrivals.adapter).argmax()
        times_s = arrivals.arrival_s[busiest]
        gaps_s = np.diff(times_s)[np.diff(times_s // 60) == 0]
        cvs.append(gaps_s.std() / gaps_s.mean())
    assert cvs[0] == pytest.approx(1, abs=0.1)
    assert cvs[1] == pytest.approx(4, abs=0.6)


def test_servegen_windows(tmp_path: Path) -> None:
    quantiles = PUBLIC / "servegen_length_quantiles.parquet"
    name, arrivals = _converted(
        PUBLIC / "servegen_windows.parquet",
        tmp_path / "x.parquet",
        spread=Spread.FITTED,
        lengths=f"servegen:{quantiles}",
    )
    rows = pq.read_table(PUBLIC / "servegen_windows.parquet").to_pylist()
    assert name == "servegen-windows"
    for row in rows:
        tenant = arrivals.tenants.index(f"m-large/c{row['client']:03d}")
        start_s = row["window_start_s"]
        inside = (arrivals.tenant == tenant) & (arrivals.arrival_s >= start_s) & (arrivals.arrival_s < start_s + 600)
        assert inside.sum() == row["count"]
        if row["count"] > 500:
            gaps_s = np.diff(arrivals.arrival_s[inside])
            cv = _fitted_cv(row["pattern"], row["param1"])
            # The longest gaps of a heavy tail do not fit into ten minutes.
            assert 0.6 * cv < gaps_s.std() / gaps_s.mean() < 1.3 * cv
    assert arrivals.prompt_tokens.min() >= 1
    assert arrivals.output_tokens.min() >= 1


def _fitted_cv(pattern: str, shape: float) -> float:
    if pattern == "Gamma":
        return float(shape**-0.5)
    return math.sqrt(math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1)


def test_functions_stand_for_adapters(tmp_path: Path) -> None:
    functions = list(dict.fromkeys(pq.read_table(MAF).column("function").to_pylist()))
    _, plain = _converted(MAF, tmp_path / "x.parquet")
    for strategy in MappingStrategy:
        _, mapped = _converted(MAF, tmp_path / "x.parquet", adapters=3, mapping=strategy)
        place = {name: index for index, name in enumerate(functions)}
        if strategy is MappingStrategy.STRIPE:
            expected = [place[str(name)] % 3 for name in _names(plain)]
        else:
            expected = [3 * place[str(name)] // len(functions) for name in _names(plain)]
        assert np.array_equal(mapped.arrival_s // 60, plain.arrival_s // 60)
        assert sorted(map(str, _names(mapped))) == sorted(f"adapter-{index}" for index in expected)
        assert len(mapped.adapters) == 3
    with pytest.raises(BadConfig, match="8 functions cannot stand for 9 adapters"):
        convert(str(MAF), tmp_path / "y.parquet", ConvertOptions(adapters=9))


def test_maf_2021_is_sorted_by_start(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("app,func,end_timestamp,duration\na,f,10,1\na,g,11,8\nb,f,12,20\n")
    name, arrivals = _converted(tmp_path / "x.txt", tmp_path / "x.parquet")
    assert name == "maf-2021"
    assert arrivals.arrival_s.tolist() == [0, 3, 9]
    assert [(a.tenant, a.name) for a in arrivals.adapters] == [("b", "f"), ("a", "g"), ("a", "f")]


def test_missing_lengths_are_filled_in(tmp_path: Path) -> None:
    before = read_arrivals(DATA / "servegen_m_large_300.parquet")
    _, after = _converted(DATA / "servegen_m_large_300.parquet", tmp_path / "x.parquet", lengths="fixed:7,9")
    known = before.prompt_tokens >= 0
    assert np.array_equal(after.prompt_tokens, np.where(known, before.prompt_tokens, 7))
    assert np.array_equal(after.output_tokens, np.where(known, before.output_tokens, 9))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "timestamp_s,colour\n1,red\n", "format public has no column 'colour'"),
        ("x.csv", "when,who\n1,2\n", "columns when, who are those of no known format"),
        ("x.csv", "timestamp_s,prompt_tokens\n1,2\n2,many\n", "many"),
        ("x.csv", "timestamp_s,prompt_tokens\n1,2\n2,-7\n", "row 1 has prompt_tokens -7"),
        ("x.csv", "timestamp_s\n5\n4\n", "row 1 arrives at 4.0 s"),
        ("x.csv", "timestamp_s,tenant\n5,a\n,b\n", "1 rows have no arrival time"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "yesterday"),
        ("x.csv", "", "Empty CSV"),
        ("x.jsonl", "[1]\n", "no JSON object"),
        ("x.jsonl", '{"timestamp": 1, "input_length": 2}\n', "no known format"),
        ("x.jsonl", '{"timestamp": 1, "input_length": "a", "output_length": 2}\n', "input_length"),
        ("x.npz", "PK", "x.npz"),
        ("x.parquet", "PAR1", "x.parquet"),
        ("x.xlsx", "", "not one of .csv"),
        ("x.csv", "function,minute,count,owner\nf,1,-2,o\n", "missing or negative"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput) as caught:
        convert(str(tmp_path / name), tmp_path / "out.parquet", ConvertOptions())
    assert words in caught.value.message
    assert name in caught.value.message
    assert not (tmp_path / "out.parquet").exists()


def test_what_was_refused_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("timestamp_s,colour\n5,red\n4,blue\n")
    options = ConvertOptions(ignore_columns=("colour",), sort=True)
    convert(str(tmp_path / "x.csv"), tmp_path / "out.parquet", options)
    assert read_arrivals(tmp_path / "out.parquet").arrival_s.tolist() == [4, 5]


def test_bad_options(tmp_path: Path) -> None:
    source, out = str(DATA / "lmsys_arena_200.parquet"), tmp_path / "out.parquet"
    for options, word in (
        ({"format": "nosuch"}, "nosuch"),
        ({"spread": Spread.GAMMA}, "no counts"),
        ({"exclude_triggers": ("timer",)}, "triggers"),
    ):
        with pytest.raises(BadConfig, match=word):
            convert(source, out, ConvertOptions(**options))  # type: ignore[arg-type]
    for name, value in (("speed", 0.0), ("cv", float("nan")), ("adapters", -1)):
        with pytest.raises(BadConfig, match=name):
            ConvertOptions(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="no column 'TIMESTAMP', which format azure-llm needs"):
        convert(source, out, ConvertOptions(format="azure-llm"))
    for path in ("nosuch.csv", "nosuch.parquet", "nosuch*.parquet"):
        with pytest.raises(NotFound, match="nosuch"):
            convert(str(tmp_path / path), out, ConvertOptions())


def test_npz_that_is_no_table(tmp_path: Path) -> None:
    for arrays, words in (
        ({"timestamp_s": np.zeros(3), "adapter": np.zeros(2)}, "different lengths"),
        ({"timestamp_s": np.zeros((3, 2))}, "one dimension"),
        ({"timestamp_s": np.array([None])}, "object"),
    ):
        np.savez(tmp_path / "x.npz", allow_pickle=True, **arrays)
        with pytest.raises(InvalidInput, match=words):
            convert(str(tmp_path / "x.npz"), tmp_path / "out.parquet", ConvertOptions())


def test_a_parquet_of_other_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"t": ["x"], "model": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidInput, match=r"x\.parquet: column 't' as double"):
        convert(str(tmp_path / "x.parquet"), tmp_path / "out.parquet", ConvertOptions())
