"""Lengths: the distributions that were asked for, whatever the chunks."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.core.errors import BadConfig, InvalidInput, NotFound
from loraplex.traces.synth import lengths as lengths_module
from loraplex.traces.synth.lengths import Limits, parse_lengths

DATA = Path(__file__).parents[1] / "data"
QUANTILES = DATA / "public" / "servegen_length_quantiles.parquet"
NO_LIMITS = Limits()


def _drawn(
    text: str, count: int, *, chunk: int, limits: Limits = NO_LIMITS
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """[2, count]: prompts and outputs of adapters 0, 1, 2, 3, 0, ..."""
    sampler = parse_lengths(text, seed=1, limits=limits)
    adapters = (np.arange(count) % 4).astype(np.int32)
    parts = [np.stack(sampler.draw(adapters[start : start + chunk])) for start in range(0, count, chunk)]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "text", ["lognormal:500,1.5,100,0.5", f"trace:{DATA / 'lmsys_arena_200.parquet'}", f"servegen:{QUANTILES}#m-large"]
)
def test_chunks_do_not_matter(text: str) -> None:
    assert np.array_equal(_drawn(text, 5000, chunk=5000), _drawn(text, 5000, chunk=777))


def test_fixed_and_lognormal() -> None:
    assert np.unique(_drawn("fixed:128,64", 100, chunk=100), axis=1).tolist() == [[128], [64]]
    prompt, output = _drawn("lognormal:500,1.5,100,0.5", 200_000, chunk=200_000)
    assert prompt.mean() == pytest.approx(500, rel=0.03)
    assert prompt.std() / prompt.mean() == pytest.approx(1.5, rel=0.1)
    assert output.mean() == pytest.approx(100, rel=0.02)
    assert abs(np.corrcoef(prompt, output)[0, 1]) < 0.02
    cut = _drawn("lognormal:500,1.5,100,0.5", 1000, chunk=1000, limits=Limits(300, 50))
    assert cut.max(axis=1).tolist() == [300, 50]
    assert cut.min() >= 1


def test_pairs_of_a_trace_stay_pairs() -> None:
    table = pq.read_table(DATA / "lmsys_arena_200.parquet")
    pairs = set(zip(table.column("prompt_tokens").to_pylist(), table.column("output_tokens").to_pylist(), strict=True))
    drawn = set(zip(*_drawn(f"trace:{DATA / 'lmsys_arena_200.parquet'}", 3000, chunk=3000).tolist(), strict=True))
    assert drawn <= pairs
    assert len(drawn) > 0.9 * len(pairs)


def test_a_long_trace_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "_SAMPLE_ROWS", 1000)
    rows = 200_000
    table = pa.table(
        {"timestamp_s": np.zeros(rows), "prompt_tokens": np.arange(1, rows + 1), "output_tokens": np.ones(rows, int)}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    prompts = _drawn(f"trace:{tmp_path / 'x.parquet'}", 20_000, chunk=20_000)[0]
    assert len(np.unique(prompts)) <= 1000
    assert np.histogram(prompts, bins=4, range=(0, rows))[0] == pytest.approx([5000] * 4, rel=0.1)


def test_servegen_quantiles() -> None:
    rows = {(row["client"], row["field"]): row["quantiles"] for row in pq.read_table(QUANTILES).to_pylist()}
    prompt, output = _drawn(f"servegen:{QUANTILES}", 40_000, chunk=40_000)
    for client in range(4):
        for drawn, field in ((prompt[client::4], "prompt"), (output[client::4], "output")):
            expected = rows[client, field]
            assert expected[0] - 1 <= drawn.min()
            assert drawn.max() <= expected[100]
            assert np.median(drawn) == pytest.approx(expected[50], rel=0.05)
            assert np.percentile(drawn, 90) == pytest.approx(expected[90], rel=0.1)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nosuch"):
        parse_lengths("servegen:nosuch.parquet", seed=0, limits=NO_LIMITS)
    with pytest.raises(BadConfig, match="no pool 'x', only m-large"):
        parse_lengths(f"servegen:{QUANTILES}#x", seed=0, limits=NO_LIMITS)
    with pytest.raises(InvalidInput, match="pool, client, field"):
        parse_lengths(f"servegen:{DATA / 'lmsys_arena_200.parquet'}", seed=0, limits=NO_LIMITS)
    pq.write_table(pa.table({"timestamp_s": [1.0]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidInput, match="no row has prompt_tokens and output_tokens"):
        parse_lengths(f"trace:{tmp_path / 'x.parquet'}", seed=0, limits=NO_LIMITS)
    for text in ("", "fixed", "fixed:0,1", "fixed:nan,1", "lognormal:1,2,3", "other:1,2"):
        with pytest.raises(BadConfig, match="expected fixed:"):
            parse_lengths(text, seed=0, limits=NO_LIMITS)
