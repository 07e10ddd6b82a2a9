"""Recorder to writer to reader, with a controller that fails in between."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

from loraplex.traces.config import TraceConfig
from loraplex.traces.reader import read_traces
from loraplex.traces.recorder import TraceRecorder
from loraplex.traces.row import TraceRow
from loraplex.traces.writer import TraceWriter


async def test_every_row_once_and_in_order(tmp_path: Path, make_row: Callable[..., TraceRow]) -> None:
    """A call may fail before or after the controller took the batch; the file shows every row exactly once."""
    config = TraceConfig(send_interval_s=0.01, write_interval_s=0.05, retry_first_s=0.005, retry_max_s=0.01)
    writer = TraceWriter(config, str(tmp_path))
    chance = random.Random(5)

    async def send(batch: bytes) -> None:
        await asyncio.sleep(0.001)
        if chance.random() < 0.3:
            raise ConnectionError("before")
        writer.append(batch)
        if chance.random() < 0.3:
            raise ConnectionError("after")

    recorders = [TraceRecorder(config, send=send) for _ in range(2)]
    for recorder in recorders:
        await recorder.start()
    for i in range(300):
        recorders[i % 2].record(make_row(i))
        if i % 10 == 0:
            await asyncio.sleep(0.005)
    for recorder in recorders:
        await recorder.close()
    await asyncio.to_thread(writer.close)
    writer.validate()
    rows = [TraceRow(**entry) for table in read_traces(tmp_path) for entry in table.to_pylist()]
    assert writer.status().repeated_batches > 0
    assert sorted(rows, key=lambda row: row.request_id) == [make_row(i) for i in range(300)]
    for side in range(2):
        ids = [row.request_id for row in rows if int(row.request_id[-6:]) % 2 == side]
        assert ids == sorted(ids)
