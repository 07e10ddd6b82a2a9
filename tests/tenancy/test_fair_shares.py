"""Max-min division and Jain's index."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.tenancy.fair_shares import jain_index, max_min_shares


def test_the_modest_get_what_they_ask_for() -> None:
    assert max_min_shares([10.0, 2.0, 3.0], 9.0).tolist() == [4.0, 2.0, 3.0]
    assert max_min_shares([1.0, 2.0], 9.0).tolist() == [1.0, 2.0]


def test_the_others_divide_by_weight() -> None:
    assert max_min_shares([100.0, 100.0, 1.0], 13.0, [3.0, 1.0, 1.0]).tolist() == [9.0, 3.0, 1.0]
    # Twice the weight, but no use for it.
    assert max_min_shares([4.0, 100.0], 12.0, [2.0, 1.0]).tolist() == [4.0, 8.0]


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 10)), min_size=1, max_size=8), st.floats(0.1, 500))
def test_nobody_can_get_more_but_from_who_has_less_by_weight(tenants: list[tuple[float, float]], total: float) -> None:
    asked, weights = (list(column) for column in zip(*tenants, strict=True))
    shares = max_min_shares(asked, total, weights)
    assert shares.sum() == pytest.approx(min(total, sum(asked)))
    most = max(share / weight for share, weight in zip(shares, weights, strict=True))
    for share, wanted, weight in zip(shares, asked, weights, strict=True):
        assert share <= wanted * (1 + 1e-9)
        if share < wanted * (1 - 1e-9):
            assert share / weight == pytest.approx(most)


def test_jain_index() -> None:
    assert jain_index([2.0, 2.0, 2.0]) == 1.0
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain_index([]) == 1.0
