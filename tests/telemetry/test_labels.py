"""Labels are bounded; those of the busiest change only where others are clearly busier."""

import random
from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st
from loraplex.telemetry.labels import LabelCap, TopValues


def test_label_cap() -> None:
    cap = LabelCap(2)
    assert [cap(value) for value in ("a", "b", "c", "a", "c")] == ["a", "b", "other", "a", "other"]


@example([(0, 0.0), (1, 0.0), (1, 0.0), (2, 5.0), (2, 5.0), (2, 5.0), (2, 5.0)], 1)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 5)), max_size=200), st.integers(0, 8))
def test_never_more_than_there_is_room_for(events: list[tuple[int, float]], room: int) -> None:
    chosen: set[int] = set()
    top: TopValues[int] = TopValues(room, window_s=10.0, on_leave=chosen.discard)
    now_s = 0.0
    for value, pause_s in events:
        now_s += pause_s
        if top.count(value, now_s):
            chosen.add(value)
        else:
            assert value not in chosen
        top.validate()
        assert len(chosen) <= room


def test_the_busiest_are_found_and_equals_do_not_take_turns() -> None:
    left: list[int] = []
    top: TopValues[int] = TopValues(20, window_s=60.0, on_leave=left.append)
    draw = random.Random(3)
    own: Counter[int] = Counter()
    for index in range(60_000):
        # A hundred that are all alike, and twenty that have ten times as many requests each.
        value = draw.randrange(100, 120) if draw.random() < 0.66 else draw.randrange(100)
        if top.count(value, index / 100):
            own[value] += 1
    assert sum(own[value] for value in range(100, 120)) > 0.6 * 60_000
    assert len(left) <= 20
