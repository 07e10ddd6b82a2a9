"""The writer: durable within its interval, whole files only, bounded memory, nothing lost on a clean stop."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.traces.config import TraceConfig
from loraplex.traces.reader import read_traces
from loraplex.traces.row import TraceRow
from loraplex.traces.schema import encode_batch
from loraplex.traces.storage import TraceFolder, part_name
from loraplex.traces.writer import TraceWriter

_CHILD = """
import json, sys, time
from loraplex.traces.config import TraceConfig
from loraplex.traces.row import TraceRow
from loraplex.traces.schema import encode_batch
from loraplex.traces.writer import TraceWriter

folder, interval = sys.argv[1], float(sys.argv[2])
writer = TraceWriter(TraceConfig(write_interval_s=interval, rotate_age_s=0.5, adopt_age_s=1.0), folder)
writer.start()
index = 0
while True:
    row = TraceRow(arrival_s=time.time(), tenant="a", request_id=f"r{index:06d}", endpoint="completions",
                   base_model_id="m", prompt_tokens=1, output_tokens=1, e2e_s=0.1, status=200, stream=False)
    writer.append(encode_batch([row], source="g", sequence=index))
    print(json.dumps([index, time.time()]), flush=True)
    index += 1
    time.sleep(0.005)
"""


class _FailingFolder(TraceFolder):
    """A disk that is full while ``full`` is set."""

    full = False

    def write(self, name: str, run: str, data: pa.Buffer) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(name, run, data)


def _ids(path: Path) -> list[str]:
    return [name for table in read_traces(path) for name in table.column("request_id").to_pylist()]


def _batch(make_row: Callable[..., TraceRow], start: int, end: int, sequence: int = -1) -> bytes:
    return encode_batch([make_row(i) for i in range(start, end)], source="g", sequence=sequence)


def _wait(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.01)


def test_clean_stop_loses_nothing(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writer = TraceWriter(TraceConfig(), str(tmp_path))
    writer.start()
    for i in range(20):
        writer.append(_batch(make_row, 10 * i, 10 * i + 10, i))
    writer.close()
    writer.validate()
    assert _ids(tmp_path) == [f"request-{i:06d}" for i in range(200)]
    status = writer.status()
    assert (status.received_rows, status.written_rows, status.buffered_rows, status.dropped_rows) == (200, 200, 0, 0)
    assert [name.split("-")[0] for name in os.listdir(tmp_path)] == ["trace"], "parts are merged at close"


def test_rows_reach_the_disk_within_the_interval(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writer = TraceWriter(TraceConfig(write_interval_s=0.1), str(tmp_path))
    writer.start()
    try:
        for start in (0, 1, 2):
            writer.append(_batch(make_row, start, start + 1, start))
            _wait(lambda: writer.status().buffered_rows == 0, timeout_s=3)
        assert _ids(tmp_path) == [f"request-{i:06d}" for i in range(3)]
    finally:
        writer.close()


def test_repeated_batches_are_written_once(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writer = TraceWriter(TraceConfig(), str(tmp_path))
    writer.start()
    for sequence in (0, 0, 1, 1, 0):
        writer.append(_batch(make_row, 10 * sequence, 10 * sequence + 10, sequence))
    writer.close()
    assert len(_ids(tmp_path)) == 20
    assert writer.status().repeated_batches == 3


def test_bad_batch_is_refused_and_harmless(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writer = TraceWriter(TraceConfig(), str(tmp_path))
    writer.start()
    with pytest.raises(InvalidInput):
        writer.append(b"not arrow")
    writer.append(_batch(make_row, 0, 1))
    writer.close()
    assert len(_ids(tmp_path)) == 1


def test_full_disk_keeps_rows_then_drops_the_oldest(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    folder = _FailingFolder(pafs.LocalFileSystem(), str(tmp_path))
    folder.full = True
    writer = TraceWriter(TraceConfig(write_interval_s=0.02, max_unwritten_rows=30), str(tmp_path), folder=folder)
    writer.start()
    try:
        for i in range(10):
            writer.append(_batch(make_row, 7 * i, 7 * i + 7, i))
            writer.validate()
        # Rows over the limit go when the write in progress has failed too.
        _wait(lambda: (writer.status().buffered_rows, writer.status().dropped_rows) == (30, 40))
        assert "No space left" in (writer.status().last_error or "")
        folder.full = False
        _wait(lambda: writer.status().written_rows == 30)
        assert writer.status().last_error is None
        assert _ids(tmp_path) == [f"request-{i:06d}" for i in range(40, 70)]
    finally:
        writer.close()
    writer.validate()


def test_close_on_a_full_disk_ends_and_counts(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    folder = _FailingFolder(pafs.LocalFileSystem(), str(tmp_path))
    folder.full = True
    writer = TraceWriter(TraceConfig(), str(tmp_path), folder=folder)
    writer.start()
    writer.append(_batch(make_row, 0, 5))
    writer.close()
    assert writer.status().dropped_rows == 5
    assert os.listdir(tmp_path) == []


def test_a_real_write_error_leaves_no_torn_file(tmp_path: Path) -> None:
    """The kernel refuses every write past one KiB, as a full disk would in the middle of a file."""
    code = f"""
import os, resource
from loraplex.traces.config import TraceConfig
from loraplex.traces.row import TraceRow
from loraplex.traces.schema import encode_batch
from loraplex.traces.writer import TraceWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
writer = TraceWriter(TraceConfig(write_interval_s=0.05), {str(tmp_path)!r})
writer.start()
rows = [TraceRow(arrival_s=float(i), tenant="a", request_id=os.urandom(16).hex(), endpoint="completions",
                 base_model_id="m", prompt_tokens=1, output_tokens=1, e2e_s=0.1, status=200, stream=False)
        for i in range(100)]
writer.append(encode_batch(rows, source="g", sequence=0))
writer.close()
status = writer.status()
assert status.dropped_rows == 100, status
assert "File too large" in status.last_error, status
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert os.listdir(tmp_path) == []


def test_parts_are_merged_by_age_while_running(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writer = TraceWriter(TraceConfig(write_interval_s=0.02, rotate_age_s=0.2, adopt_age_s=5.0), str(tmp_path))
    writer.start()
    try:
        for i in range(5):
            writer.append(_batch(make_row, i, i + 1, i))
            _wait(lambda: writer.status().buffered_rows == 0)
        _wait(lambda: any(name.startswith("trace-") for name in os.listdir(tmp_path)))
        assert len(_ids(tmp_path)) == 5
    finally:
        writer.close()
    assert sorted(_ids(tmp_path)) == [f"request-{i:06d}" for i in range(5)]


def test_parts_are_merged_by_size(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writer = TraceWriter(TraceConfig(write_interval_s=0.02, rotate_bytes=20_000), str(tmp_path))
    writer.start()
    try:
        for i in range(6):
            writer.append(_batch(make_row, i, i + 1, i))
            _wait(lambda: writer.status().buffered_rows == 0)
        _wait(lambda: any(name.startswith("trace-") for name in os.listdir(tmp_path)))
    finally:
        writer.close()
    assert len(_ids(tmp_path)) == 6


def test_retention_deletes_the_oldest(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    sizes = []
    for i in range(4):
        writer = TraceWriter(TraceConfig(), str(tmp_path))
        writer.start()
        writer.append(_batch(make_row, i, i + 1))
        writer.close()
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        time.sleep(0.002)
    writer = TraceWriter(TraceConfig(max_total_bytes=sizes[1] + 100), str(tmp_path))
    writer.start()
    writer.close()
    assert _ids(tmp_path) == ["request-000002", "request-000003"]


def test_a_damaged_part_is_set_aside_and_the_rest_merged(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writer = TraceWriter(TraceConfig(write_interval_s=0.02), str(tmp_path))
    writer.start()
    for i in range(3):
        writer.append(_batch(make_row, i, i + 1, i))
        _wait(lambda: writer.status().buffered_rows == 0)
    damaged = sorted(tmp_path.glob("part-*"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(InvalidInput, match=damaged.name):
        _ids(tmp_path)
    writer.close()
    assert _ids(tmp_path) == ["request-000000", "request-000002"]
    assert (tmp_path / f"damaged-{damaged.name}").exists()


def test_a_restart_adopts_what_a_killed_writer_left(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    folder = TraceFolder.open(str(tmp_path))
    first = TraceWriter(TraceConfig(write_interval_s=0.02), str(tmp_path))
    first.start()
    for i in range(3):
        first.append(_batch(make_row, i, i + 1, i))
        _wait(lambda: first.status().buffered_rows == 0)
    (tmp_path / ".tmp-run-part-run-00000001.parquet").write_bytes(b"half a fi")
    for path in tmp_path.iterdir():
        os.utime(path, (1_000_000, 1_000_000))
    parts = folder.files()
    second = TraceWriter(TraceConfig(), str(tmp_path))
    second.start()
    _wait(lambda: all(not file.is_part for file in folder.files()))
    assert len(folder.files()) == 1
    assert folder.files()[0].replaces(parts[0])
    assert not (tmp_path / ".tmp-run-part-run-00000001.parquet").exists()
    assert _ids(tmp_path) == [f"request-{i:06d}" for i in range(3)]
    second.close()
    first.append(_batch(make_row, 3, 4, 3))
    first.close()
    assert _ids(tmp_path) == [f"request-{i:06d}" for i in range(4)], "the first writer goes on without its parts"


def test_two_writers_share_a_folder(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writers = [TraceWriter(TraceConfig(write_interval_s=0.01), str(tmp_path)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for i in range(30):
        writers[i % 2].append(_batch(make_row, i, i + 1, i))
        time.sleep(0.005)
    for writer in writers:
        writer.close()
    assert sorted(_ids(tmp_path)) == [f"request-{i:06d}" for i in range(30)]


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_loses_at_most_the_interval(tmp_path: Path, seed: int) -> None:
    """Everything appended earlier than the interval before the kill is there; every file is whole; nothing twice."""
    interval_s, slack_s = 0.3, 1.5
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path), str(interval_s)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    appended = [json.loads(child.stdout.readline())]
    stop_s = time.time() + 2.5 + random.Random(seed).random()
    while appended[-1][1] < stop_s:
        appended.append(json.loads(child.stdout.readline()))
    killed_s = time.time()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    found = _ids(tmp_path)
    assert found == [f"r{i:06d}" for i in range(len(found))], "in order, none twice, no hole"
    owed = sum(1 for _, at_s in appended if at_s < killed_s - interval_s - slack_s)
    assert owed > 50
    assert len(found) >= owed


def test_memory_filesystem_by_url_scheme(make_row: Callable[..., TraceRow]) -> None:
    """A file system that is not local: the generic path of writing and moving."""
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory")))
    folder = TraceFolder(filesystem, "/loraplex-traces-test")
    writer = TraceWriter(TraceConfig(), "memory", folder=folder)
    writer.start()
    writer.append(_batch(make_row, 0, 5))
    writer.close()
    assert writer.status().written_rows == 5
    assert [file.is_part for file in folder.files()] == [False]
    filesystem.delete_dir("/loraplex-traces-test")


def test_file_url(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    writer = TraceWriter(TraceConfig(), (tmp_path / "deep" / "er").as_uri())
    writer.start()
    writer.append(_batch(make_row, 0, 5))
    writer.close()
    assert len(_ids(tmp_path / "deep" / "er")) == 5


def test_bad_settings_are_named() -> None:
    with pytest.raises(BadConfig, match="nosuch://x"):
        TraceWriter(TraceConfig(), "nosuch://x")
    with pytest.raises(BadConfig, match="write_interval_s"):
        TraceConfig(write_interval_s=0)
    with pytest.raises(BadConfig, match="adopt_age_s"):
        TraceConfig(adopt_age_s=1.0)


def test_names_sort_by_time() -> None:
    assert part_name("0000000000001aa", 2) < part_name("0000000000001aa", 10) < part_name("0000000000002aa", 0)
