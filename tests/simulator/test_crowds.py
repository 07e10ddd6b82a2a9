"""The arrivals of a flash crowd and of a greedy tenant."""

import numpy as np
import pytest
from loraplex.simulator.crowds import GREEDY, HOT, flash_crowd, greedy_tenant


def test_the_crowd_is_all_that_differs_between_the_spans() -> None:
    arrivals = flash_crowd(
        seed=0,
        spans_s=(10.0, 20.0, 20.0),
        ramp_s=5.0,
        crowd_factor=20.0,
        hot_rate=2.5,
        other_rate=40.0,
        num_adapters=30,
        num_tenants=4,
    )
    times = arrivals.arrival_s
    assert (np.diff(times) >= 0).all()
    is_hot = np.array([adapter.name == HOT for adapter in arrivals.adapters])[arrivals.adapter]
    assert set(arrivals.tenant[is_hot].tolist()) == {arrivals.tenants.index("t0")}
    owners = np.array([arrivals.tenants.index(str(adapter.tenant)) for adapter in arrivals.adapters])
    assert np.array_equal(owners[arrivals.adapter], arrivals.tenant)

    def others(begin_s: float, end_s: float) -> list[tuple[float, int, int, int]]:
        rows = ~is_hot & (times >= begin_s) & (times < end_s)
        columns = (arrivals.adapter, arrivals.prompt_tokens, arrivals.output_tokens)
        found = zip(times[rows] - begin_s, *(column[rows].tolist() for column in columns), strict=True)
        return [(round(at_s, 6), *rest) for at_s, *rest in found]  # type: ignore[misc]

    assert others(10.0, 30.0) == others(30.0, 50.0)
    assert others(0.0, 10.0) == others(10.0, 20.0)
    calm, crowd = (np.count_nonzero(is_hot & (times >= begin) & (times < begin + 15)) / 15 for begin in (15.0, 35.0))
    assert calm == pytest.approx(2.5, rel=0.5)
    assert crowd == pytest.approx(50.0, rel=0.15)
    ramp = np.count_nonzero(is_hot & (times >= 30.0) & (times < 35.0)) / 5
    assert ramp == pytest.approx(0.5 * 52.5, rel=0.3)


def test_each_tenant_asks_for_its_part() -> None:
    arrivals = greedy_tenant(
        seed=1, end_s=50.0, share_per_s=4.0, asked=(0.5, 1.0), greedy_factor=10.0, adapters_per_tenant=3
    )
    assert arrivals.tenants == ("calm0", "calm1", GREEDY)
    assert len(arrivals.adapters) == 9
    rates = np.bincount(arrivals.tenant) / 50.0
    assert rates == pytest.approx([2.0, 4.0, 40.0], rel=0.01)
    owners = np.array([arrivals.tenants.index(str(adapter.tenant)) for adapter in arrivals.adapters])
    assert np.array_equal(owners[arrivals.adapter], arrivals.tenant)
    assert arrivals.arrival_s[-1] == pytest.approx(50.0, rel=0.25)
