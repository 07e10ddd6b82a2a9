"""Made-up traces: AlpaServe's own to the last bit, and the properties that a recipe asks for."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loraplex.core.errors import BadConfig
from loraplex.traces.arrivals import Arrivals, read_arrivals
from loraplex.traces.sink import TraceSink
from loraplex.traces.synth import generate as generate_module
from loraplex.traces.synth.generate import generate
from loraplex.traces.synth.popularity import adapter_rates, deal_out, power_weights
from loraplex.traces.synth.recipe import Diurnal, Drift, FlashCrowd, OnOff, Popularity, Process, Recipe

PUBLIC = Path(__file__).parents[1] / "data" / "public"


def _made(tmp_path: Path, recipe: Recipe) -> Arrivals:
    with TraceSink(tmp_path / "made.parquet") as sink:
        for table in generate(recipe):
            sink.write(table)
    return read_arrivals(tmp_path / "made.parquet")


def _adapter(arrivals: Arrivals, index: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which rows are of the adapter that the recipe counts as ``index``."""
    numbers = np.array([int(adapter.name.removeprefix("adapter-")) for adapter in arrivals.adapters])
    return numbers[arrivals.adapter] == index


def test_alpaserve_arrivals_bit_for_bit(tmp_path: Path) -> None:
    recorded = pq.read_table(PUBLIC / "alpaserve_gamma_n8_r20_cv4.parquet")
    arrivals = _made(tmp_path, Recipe(adapters=8, rate=20, cv=4, skew=0.5, duration_s=200))
    assert len(arrivals) == 3933
    assert np.array_equal(arrivals.arrival_s[:500], recorded.column("t").to_numpy())
    names = [arrivals.adapters[index].name for index in arrivals.adapter[:500]]
    assert names == [f"adapter-{model}" for model in recorded.column("model").to_pylist()]


def test_bytes_follow_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for slab_rows, seed in ((1 << 17, 3), (1 << 17, 3), (5_000, 3), (1 << 17, 4)):
        monkeypatch.setattr(generate_module, "_SLAB_ROWS", slab_rows)
        _made(tmp_path, Recipe(adapters=40, tenants=5, rate=200, duration_s=300, seed=seed, cv=3))
        digests.append(hashlib.sha256((tmp_path / "made.parquet").read_bytes()).hexdigest())
    assert digests[0] == digests[1] == digests[2] != digests[3]


@pytest.mark.parametrize(
    ("process", "cv", "expected"), [("gamma", 4.0, 4.0), ("poisson", 4.0, 1.0), ("uniform", 1.0, 0.0)]
)
def test_gaps_have_the_cv(tmp_path: Path, process: str, cv: float, expected: float) -> None:
    arrivals = _made(tmp_path, Recipe(adapters=2, rate=100, duration_s=2000, process=Process(process), cv=cv, skew=1))
    gaps_s = np.diff(arrivals.arrival_s[_adapter(arrivals, 0)])
    assert gaps_s.mean() == pytest.approx(1 / (100 * 2 / 3), rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(expected, rel=0.05, abs=1e-6)


def test_popularity() -> None:
    assert adapter_rates(12, 3, Popularity.UNIFORM, 9.0).tolist() == [4, 4, 4]
    assert adapter_rates(12, 3, Popularity.LINEAR, 9.0).tolist() == [6, 4, 2]
    rates = adapter_rates(10, 100, Popularity.POWER_LAW, 1.2)
    assert rates.sum() == pytest.approx(10)
    assert rates[9] / rates[0] == pytest.approx(10**-1.2)


def test_adapters_are_dealt_out_in_proportion() -> None:
    assert deal_out(7, [1.0, 1.0, 1.0]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    counts = np.bincount(deal_out(1000, power_weights(10, 1.0)))
    assert counts.min() >= 1
    assert counts[0] / counts[4] == pytest.approx(5, rel=0.1)
    shares = np.bincount(deal_out(2000, [1400, 600]))
    assert shares.tolist() == [1400, 600]


def test_tenants_and_bases(tmp_path: Path) -> None:
    recipe = Recipe(adapters=20, tenants=3, base_models=(("small", 15), ("large", 5)), requests=5000)
    arrivals = _made(tmp_path, recipe)
    assert {adapter.tenant for adapter in arrivals.adapters} == {"tenant-0", "tenant-1", "tenant-2"}
    assert len(arrivals.adapters) == 20
    assert sum(adapter.base_model == "large" for adapter in arrivals.adapters) == 5


def test_diurnal(tmp_path: Path) -> None:
    recipe = Recipe(adapters=4, rate=100, duration_s=2000, diurnal=Diurnal(period_s=1000, amplitude=0.8))
    arrivals = _made(tmp_path, recipe)
    assert len(arrivals) == pytest.approx(200_000, rel=0.02)
    counts = np.histogram(arrivals.arrival_s, bins=20, range=(0, 2000))[0] / 100
    middles = np.arange(20) * 100 + 50
    expected = 100 * (1 - 0.8 * np.cos(2 * np.pi * middles / 1000))
    assert np.abs(counts - expected).max() < 8


def test_flash_crowd(tmp_path: Path) -> None:
    crowd = FlashCrowd(at_s=100, duration_s=50, factor=10, first=2, count=1)
    recipe = Recipe(adapters=4, rate=100, duration_s=300, popularity=Popularity.UNIFORM, flash_crowds=(crowd,))
    arrivals = _made(tmp_path, recipe)
    hot, cold = arrivals.arrival_s[_adapter(arrivals, 2)], arrivals.arrival_s[_adapter(arrivals, 1)]
    inside = ((hot >= 100) & (hot < 150)).sum() / 50
    assert inside == pytest.approx(250, rel=0.1)
    assert (hot < 100).sum() / 100 == pytest.approx(25, rel=0.15)
    assert ((cold >= 100) & (cold < 150)).sum() / 50 == pytest.approx(25, rel=0.15)


def test_drift_rotates_the_ranks(tmp_path: Path) -> None:
    arrivals = _made(
        tmp_path, Recipe(adapters=8, rate=400, duration_s=300, skew=1.0, drift=Drift(every_s=100, shift=3))
    )
    for window in range(3):
        inside = (arrivals.arrival_s >= window * 100) & (arrivals.arrival_s < window * 100 + 100)
        counts = [int((inside & _adapter(arrivals, i)).sum()) for i in range(8)]
        assert int(np.argmax(counts)) == 3 * window
        assert int(np.argmin(counts)) in ((3 * window - 1) % 8, (3 * window - 2) % 8)
        assert sum(counts) == pytest.approx(40_000, rel=0.03)


def test_on_off_is_silent_and_then_loud(tmp_path: Path) -> None:
    recipe = Recipe(adapters=1, rate=50, duration_s=5000, on_off=OnOff(mean_on_s=10, mean_off_s=30))
    arrivals = _made(tmp_path, recipe)
    assert len(arrivals) == pytest.approx(250_000, rel=0.15)
    counts = np.histogram(arrivals.arrival_s, bins=5000, range=(0, 5000))[0]
    assert (counts == 0).mean() == pytest.approx(0.75, abs=0.08)
    assert np.median(counts[counts > 0]) == pytest.approx(200, rel=0.1)


def test_changes_leave_the_process_as_it_is(tmp_path: Path) -> None:
    """A change that changes nothing gives the same arrivals, up to rounding."""
    plain = _made(tmp_path, Recipe(adapters=6, rate=50, duration_s=500, cv=4))
    flat = _made(
        tmp_path,
        Recipe(
            adapters=6, rate=50, duration_s=500, cv=4, diurnal=Diurnal(amplitude=0.0), drift=Drift(every_s=7, shift=0)
        ),
    )
    assert np.allclose(plain.arrival_s, flat.arrival_s, atol=1e-9)
    assert np.array_equal(plain.prompt_tokens, flat.prompt_tokens)


def test_requests_and_duration_end_a_trace(tmp_path: Path) -> None:
    assert len(_made(tmp_path, Recipe(requests=123))) == 123
    assert len(_made(tmp_path, Recipe(requests=123, duration_s=1))) < 30
    many = pa.concat_tables(generate(Recipe(rate=1000, requests=300_000)))
    assert many.num_rows == 300_000


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rate": 0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"cv": -1}, "cv"),
        ({"requests": None}, "duration"),
        ({"adapters": 3, "tenants": 4}, "tenants"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"skew": -0.5}, "skew"),
        ({"base_models": (("m", 0),)}, "base model"),
        ({"lengths": "fixed:3"}, "fixed:3"),
        ({"lengths": "lognormal:1,2,x,4"}, "lognormal"),
    ],
)
def test_bad_recipes(changes: dict[str, object], word: str) -> None:
    with pytest.raises(BadConfig, match=word):
        next(generate(Recipe(**{"requests": 10, **changes})))  # type: ignore[arg-type]
