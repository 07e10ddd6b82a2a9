"""The sketch against numpy: exact while values are few, within half a percent after that, alone and in groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.traces import quantiles
from loraplex.traces.quantiles import NUM_BINS, GroupedSketch, QuantileSketch, bin_of, value_of
from loraplex.traces.tally import GroupTally, zipf_exponent

_SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)


def test_few_values_are_exact() -> None:
    sketch = QuantileSketch()
    values = np.random.default_rng(0).lognormal(3, 2, 1000)
    for part in np.array_split(values, 7):
        sketch.add(part)
    assert [sketch.quantile(share) for share in _SHARES] == [float(np.quantile(values, share)) for share in _SHARES]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_many_values_are_close(scale: float) -> None:
    sketch = QuantileSketch()
    values = np.random.default_rng(1).lognormal(0, 2, 300_000) * scale
    for part in np.array_split(values, 9):
        sketch.add(part)
    for share in (0.01, 0.5, 0.9, 0.99, 0.999):
        assert sketch.quantile(share) == pytest.approx(float(np.quantile(values, share, method="lower")), rel=0.0051)
    assert sketch.quantile(1.0) == pytest.approx(values.max(), rel=0.0051)
    assert (sketch.count, sketch.max) == (300_000, values.max())
    assert sketch.total == pytest.approx(values.sum())


@given(st.lists(st.floats(1e-9, 1e12), min_size=1))
def test_a_bin_is_near_its_values(values: list[float]) -> None:
    bins = bin_of(np.array(values))
    assert bins.min() > 0
    assert bins.max() < NUM_BINS
    assert value_of(bins) == pytest.approx(values, rel=0.0051)


def test_zeros_and_extremes() -> None:
    assert value_of(bin_of(np.array([0.0]))) == [0.0]
    assert bin_of(np.array([1e300]))[0] < NUM_BINS


@settings(max_examples=30, deadline=None)
@given(groups=st.lists(st.integers(0, 6), min_size=1, max_size=200), seed=st.integers(0, 99), few=st.integers(1, 50))
def test_groups(groups: list[int], seed: int, few: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantiles, "EXACT_VALUES", few)
        group, values = np.array(groups, dtype=np.int32), np.random.default_rng(seed).exponential(1, len(groups))
        sketch = GroupedSketch()
        for start in range(0, len(group), 17):
            sketch.add(group[start : start + 17], values[start : start + 17])
        found = sketch.quantiles(0.5, 8)
    for index in range(8):
        own = values[group == index]
        if len(own):
            assert found[index] == pytest.approx(np.quantile(own, 0.5, method="lower"), rel=0.0051)
        else:
            assert np.isnan(found[index])


@settings(max_examples=50, deadline=None)
@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=100), seed=st.integers(0, 99), chunk=st.integers(1, 30))
def test_gaps_of_groups_over_chunks(groups: list[int], seed: int, chunk: int) -> None:
    group = np.array(groups, dtype=np.int32)
    times_s = np.cumsum(np.random.default_rng(seed).exponential(1, len(groups)))
    tally = GroupTally(("tokens",))
    for start in range(0, len(group), chunk):
        part = slice(start, start + chunk)
        tally.add(group[part], times_s[part], tokens=np.where(group[part] == 1, np.nan, 2.0))
    cv = tally.gap_cv()
    for index in range(len(cv)):
        own = np.diff(times_s[group == index])
        if len(own) >= 2:
            assert cv[index] == pytest.approx(own.std() / own.mean(), abs=1e-6)
        else:
            assert np.isnan(cv[index])
        assert tally.total("requests")[index] == (group == index).sum()
        assert tally.total("tokens")[index] == (0 if index == 1 else 2 * (group == index).sum())


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.8])
def test_zipf_fit(exponent: float) -> None:
    weights = np.arange(1, 201) ** -exponent
    counts = np.random.default_rng(2).multinomial(200_000, weights / weights.sum()).astype(float)
    assert zipf_exponent(counts) == pytest.approx(exponent, abs=0.05)
    assert zipf_exponent(np.array([5.0])) is None
