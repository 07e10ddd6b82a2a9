"""Whether a plan is better by more than chance."""

import numpy as np
import pytest
from loraplex.planner.chance import paired_interval


def test_pairs_tell_more_than_means() -> None:
    random = np.random.default_rng(1)
    first = random.random(1000) < 0.6
    second = first.copy()
    second[np.flatnonzero(first)[:20]] = False
    low, high = paired_interval(first, second)
    assert 0 < low < 0.02 < high < 0.03
    # The same difference of means, of requests that have nothing to do with each other.
    other = np.roll(second, 500)
    low, high = paired_interval(first, other)
    assert low < 0 < high


def test_few_requests_tell_nothing() -> None:
    first = np.array([True] * 9 + [False])
    second = np.array([True] * 8 + [False] * 2)
    assert paired_interval(first, second)[0] == 0.0
    assert paired_interval(first, first) == (0.0, 0.0)
    assert paired_interval(second, first)[0] == pytest.approx(-0.3)
