"""The recorder: never blocks, keeps order, loses nothing that it can deliver."""

import asyncio
from collections.abc import Callable

from loraplex.core.errors import InvalidInput
from loraplex.traces.config import TraceConfig
from loraplex.traces.recorder import TraceRecorder
from loraplex.traces.row import ArrivalRow, TraceRow
from loraplex.traces.schema import decode_batch

_FAST = TraceConfig(send_interval_s=0.01, retry_first_s=0.005, retry_max_s=0.01)


class _Receiver:
    """Collects batches; fails the first ``failures`` calls, after taking the data if ``lost_reply``."""

    def __init__(self, *, failures: int = 0, lost_reply: bool = False) -> None:
        self.failures = failures
        self.lost_reply = lost_reply
        self.batches: list[bytes] = []

    async def send(self, data: bytes) -> None:
        await asyncio.sleep(0)
        if self.failures > 0:
            self.failures -= 1
            if self.lost_reply:
                self.batches.append(data)
            raise ConnectionError("controller is away")
        self.batches.append(data)

    def arrived_ids(self) -> list[list[str]]:
        """Of each batch."""
        arrivals = [decode_batch(data).arrivals for data in self.batches]
        return [table.column("request_id").to_pylist() for table in arrivals if table is not None]

    def request_ids(self) -> list[str]:
        return [name for data in self.batches for name in decode_batch(data).table.column("request_id").to_pylist()]


async def test_rows_arrive_in_order_across_failures(make_row: Callable[..., TraceRow]) -> None:
    receiver = _Receiver(failures=5)
    recorder = TraceRecorder(_FAST, send=receiver.send)
    await recorder.start()
    rows = [make_row(i) for i in range(50)]
    for row in rows:
        recorder.record(row)
        await asyncio.sleep(0.001)
    await recorder.close()
    assert receiver.request_ids() == [row.request_id for row in rows]
    counters = recorder.counters
    assert (counters.recorded, counters.sent, counters.dropped, counters.buffered) == (50, 50, 0, 0)
    assert counters.failed_sends == 5


def _arrival(row: TraceRow) -> ArrivalRow:
    return ArrivalRow(**{name: getattr(row, name) for name in ArrivalRow.__dataclass_fields__})


async def test_arrivals_are_told_while_nothing_ends_and_never_after_their_row(
    make_row: Callable[..., TraceRow],
) -> None:
    receiver = _Receiver(failures=2)
    recorder = TraceRecorder(_FAST, send=receiver.send)
    await recorder.start()
    rows = [make_row(i) for i in range(30)]
    for row in rows[:10]:
        recorder.arrived(_arrival(row))
    async with asyncio.timeout(5):
        while not receiver.batches:  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.002)
    assert receiver.arrived_ids() == [[row.request_id for row in rows[:10]]]
    assert (receiver.request_ids(), recorder.counters.recorded) == ([], 0)
    for row in rows[10:]:
        recorder.arrived(_arrival(row))
        recorder.record(row)
        await asyncio.sleep(0.001)
    await recorder.close()
    assert [name for names in receiver.arrived_ids() for name in names] == [row.request_id for row in rows]
    known: set[str] = set()
    for data, arrived in zip(receiver.batches, receiver.arrived_ids(), strict=True):
        known.update(arrived)
        assert known >= set(decode_batch(data).table.column("request_id").to_pylist())


async def test_of_arrivals_that_nobody_takes_the_latest_are_kept(make_row: Callable[..., TraceRow]) -> None:
    receiver = _Receiver()
    recorder = TraceRecorder(TraceConfig(send_interval_s=0.01, max_unsent_rows=5), send=receiver.send)
    for i in range(12):
        recorder.arrived(_arrival(make_row(i)))
    await recorder.close()
    assert receiver.arrived_ids() == [[f"request-{i:06d}" for i in range(7, 12)]]


async def test_a_repeat_carries_the_same_sequence(make_row: Callable[..., TraceRow]) -> None:
    receiver = _Receiver(failures=1, lost_reply=True)
    recorder = TraceRecorder(_FAST, send=receiver.send)
    recorder.record(make_row(0))
    await recorder.start()
    await asyncio.sleep(0.05)
    recorder.record(make_row(1))
    await recorder.close()
    decoded = [decode_batch(data) for data in receiver.batches]
    assert [batch.sequence for batch in decoded] == [0, 0, 1]
    assert len({batch.source for batch in decoded}) == 1


async def test_a_row_waits_no_longer_than_the_interval(make_row: Callable[..., TraceRow]) -> None:
    receiver = _Receiver()
    recorder = TraceRecorder(TraceConfig(send_interval_s=0.05), send=receiver.send)
    await recorder.start()
    recorder.record(make_row(0))
    await asyncio.sleep(0.3)
    assert receiver.request_ids() == ["request-000000"]
    await recorder.close()


async def test_a_full_batch_is_sent_at_once(make_row: Callable[..., TraceRow]) -> None:
    receiver = _Receiver()
    recorder = TraceRecorder(TraceConfig(send_interval_s=60, max_batch_rows=10), send=receiver.send)
    await recorder.start()
    await asyncio.sleep(0)
    for i in range(25):
        recorder.record(make_row(i))
    await asyncio.sleep(0.1)
    assert len(receiver.request_ids()) == 20
    await recorder.close()
    assert len(receiver.request_ids()) == 25
    assert max(decode_batch(data).table.num_rows for data in receiver.batches) == 10


async def test_memory_is_bounded_and_the_oldest_go(make_row: Callable[..., TraceRow]) -> None:
    receiver = _Receiver(failures=10**6)
    recorder = TraceRecorder(
        TraceConfig(
            send_interval_s=0.01, retry_first_s=0.005, max_unsent_rows=20, max_batch_rows=5, close_timeout_s=0.1
        ),
        send=receiver.send,
    )
    await recorder.start()
    for i in range(100):
        recorder.record(make_row(i))
        if i % 10 == 0:
            await asyncio.sleep(0.002)
        assert recorder.counters.buffered <= 20
    receiver.failures = 0
    await recorder.close()
    delivered = receiver.request_ids()
    assert delivered[-15:] == [f"request-{i:06d}" for i in range(85, 100)]
    assert delivered == sorted(delivered)
    counters = recorder.counters
    assert counters.dropped == 80
    assert counters.sent == 20


async def test_close_ends_even_when_nobody_listens(make_row: Callable[..., TraceRow]) -> None:
    async def never(_: bytes) -> None:
        await asyncio.sleep(3600)

    recorder = TraceRecorder(TraceConfig(send_interval_s=0.01, close_timeout_s=0.1), send=never)
    await recorder.start()
    recorder.record(make_row(0))
    await asyncio.wait_for(recorder.close(), timeout=5)
    counters = recorder.counters
    assert (counters.dropped, counters.buffered) == (1, 0)


async def test_a_hanging_send_is_repeated(make_row: Callable[..., TraceRow]) -> None:
    calls = 0

    async def hangs_once(_: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.sleep(3600)

    recorder = TraceRecorder(
        TraceConfig(send_interval_s=0.01, send_timeout_s=0.05, retry_first_s=0.01), send=hangs_once
    )
    recorder.record(make_row(0))
    await recorder.close()
    assert calls == 2
    assert recorder.counters.sent == 1


async def test_an_odd_row_costs_only_itself(make_row: Callable[..., TraceRow]) -> None:
    receiver = _Receiver()
    recorder = TraceRecorder(_FAST, send=receiver.send)
    for row in (make_row(0), make_row(1, prompt_tokens=2**40), make_row(2)):
        recorder.arrived(_arrival(row))
        recorder.record(row)
    await recorder.close()
    assert receiver.arrived_ids() == [["request-000000", "request-000002"]]
    assert receiver.request_ids() == ["request-000000", "request-000002"]
    assert recorder.counters.refused == 1


async def test_refused_batches_are_not_repeated(make_row: Callable[..., TraceRow]) -> None:
    async def refuses(_: bytes) -> None:
        raise InvalidInput("no")

    recorder = TraceRecorder(_FAST, send=refuses)
    recorder.record(make_row(0))
    await recorder.close()
    assert recorder.counters.refused == 1
    assert recorder.counters.failed_sends == 0
