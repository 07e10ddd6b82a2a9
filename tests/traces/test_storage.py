"""Which files of the folder are read, by their names alone."""

import time

from hypothesis import given
from hypothesis import strategies as st
from loraplex.traces.storage import TraceFile, part_name, trace_name, without_replaced


def _file(run: str, first: int, last: int, *, is_part: bool) -> TraceFile:
    name = part_name(run, first) if is_part else trace_name(run, first, last)
    return TraceFile(name=name, run=run, first=first, last=last, num_bytes=1, modified_s=0.0)


@st.composite
def _files(draw: st.DrawFn) -> TraceFile:
    run, first, is_part = draw(st.sampled_from("ab")), draw(st.integers(0, 6)), draw(st.booleans())
    return _file(run, first, first if is_part else first + draw(st.integers(0, 4)), is_part=is_part)


@given(st.lists(_files(), max_size=12))
def test_what_another_file_holds_is_not_read(files: list[TraceFile]) -> None:
    replaced = [file for file in files if any(other.replaces(file) for other in files)]
    present = sorted((file for file in files if file not in replaced), key=lambda file: file.sort_key)
    found, gone = without_replaced(files)
    assert gone == replaced
    assert [file.sort_key for file in found] == [file.sort_key for file in present]
    assert {file.name for file in found} == {file.name for file in present}


def test_months_of_files_take_a_moment() -> None:
    traces = [_file("a", 10 * i, 10 * i + 9, is_part=False) for i in range(20_000)]
    parts = [_file("a", i, i, is_part=True) for i in range(195_000, 205_000)]
    started_s = time.process_time()
    present, replaced = without_replaced(traces + parts)
    assert time.process_time() - started_s < 2.0
    assert (len(present), len(replaced)) == (25_000, 5_000)
