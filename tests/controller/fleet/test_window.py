"""The window that the planner and the fast loop read: what was let in counts from its arrival on, and once.

From the gateways' recorders over batches on the wire to the controller's writer, its files and its meter.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex.controller.fleet.config import PlanningConfig
from loraplex.controller.fleet.meter import TrafficMeter
from loraplex.controller.fleet.replan import Task, recent_arrivals, with_likely_outputs
from loraplex.core.clock import SystemClock
from loraplex.core.errors import NotFound
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Plan
from loraplex.traces.arrivals import AdapterName, Arrivals
from loraplex.traces.config import TraceConfig
from loraplex.traces.recorder import TraceRecorder
from loraplex.traces.row import ArrivalRow, TraceRow
from loraplex.traces.schema import encode_batch
from loraplex.traces.writer import TraceWriter

CALM, BUSY = BaseModelId("calm"), BaseModelId("busy")
WINDOW_S = 60.0


def arrival(number: int, at_s: float, *, base: str = BUSY, adapter: str | None = None) -> ArrivalRow:
    """``at_s``: Unix time."""
    return ArrivalRow(
        arrival_s=at_s,
        tenant="acme",
        request_id=f"r{number}",
        base_model_id=base,
        adapter_name=adapter,
        prompt_tokens=100 + number,
    )


def ended(row: ArrivalRow, *, status: int = 200, output_tokens: int = 20, **changes: Any) -> TraceRow:
    values: dict[str, Any] = {
        **{name: getattr(row, name) for name in ArrivalRow.__dataclass_fields__},
        "endpoint": "completions",
        "output_tokens": output_tokens,
        "ttft_s": 0.1 if output_tokens else None,
        "e2e_s": 0.3,
        "status": status,
        "stream": True,
        **changes,
    }
    return TraceRow(**values)


class Cluster:
    """Gateways' recorders and what a controller does with their batches."""

    def __init__(self, folder: Path, write_interval_s: float) -> None:
        self.config = TraceConfig(
            send_interval_s=0.005, write_interval_s=write_interval_s, retry_first_s=0.002, close_timeout_s=10.0
        )
        self.folder = folder
        self.writer = TraceWriter(self.config, str(folder))
        self.meter = TrafficMeter(SystemClock(), ttft_s=0.5, tpot_s=0.05, window_s=WINDOW_S)
        self.fails: Callable[[], bool] = lambda: False
        self.taken: set[bytes] = set()

    async def gateway(self) -> TraceRecorder:
        recorder = TraceRecorder(self.config, send=self._send)
        await recorder.start()
        return recorder

    async def _send(self, batch: bytes) -> None:
        if self.fails():
            raise ConnectionError("on the way there")
        self.writer.append(batch)
        self.meter.add(batch)
        if self.fails():
            raise ConnectionError("on the way back")

    def task(self) -> Task:
        since_s = time.time() - WINDOW_S
        return Task(
            trace_url=str(self.folder),
            since_s=since_s,
            unwritten=self.writer.unwritten(since_s),
            nodes=(),
            current=Plan(version=0, groups=()),
            config=PlanningConfig(),
            bases=(CALM, BUSY),
            lora_ranks={},
        )

    def seen(self) -> Arrivals:
        return recent_arrivals(self.task())


@contextmanager
def cluster(folder: Path, *, write_interval_s: float = 0.01) -> Iterator[Cluster]:
    made = Cluster(folder, write_interval_s)
    try:
        yield made
    finally:
        made.writer.close()
        made.writer.validate()


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not check():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)


def shares(arrivals: Arrivals) -> dict[str, int]:
    """Requests by base."""
    return {arrivals.base_models[base]: count for base, count in Counter(arrivals.base_model.tolist()).items()}


async def test_a_base_that_ends_nothing_is_seen_at_its_full_rate(tmp_path: Path) -> None:
    """Requests of the calm base end at once, those of the overloaded one wait. One in ten of these has ended before."""
    now_s = time.time()
    with cluster(tmp_path) as world:
        gateway = await world.gateway()
        for number in range(100):
            busy = arrival(number, now_s - 5 + number * 0.01, adapter="hot")
            calm = arrival(number, now_s - 5 + number * 0.01 + 0.005, base=CALM)
            gateway.arrived(busy)
            gateway.arrived(calm)
            gateway.record(ended(calm, output_tokens=7))
            if number % 4 == 0:
                gateway.record(ended(busy, output_tokens=300))
        await until(lambda: world.meter.num_requests(WINDOW_S) == 200)
        seen = world.seen()
        assert shares(seen) == {BUSY: 100, CALM: 100}
        assert np.array_equal(np.sort(seen.prompt_tokens), np.sort(np.repeat(np.arange(100, 200), 2)))
        busy_place = seen.base_models.index(BUSY)
        assert set(seen.output_tokens[seen.base_model == busy_place].tolist()) == {300}
        assert world.meter.rates(WINDOW_S) == {(BUSY, "acme", "hot"): pytest.approx(100 / WINDOW_S)}
        await gateway.close()


async def test_what_has_arrived_is_seen_before_any_file_is_there(tmp_path: Path) -> None:
    with cluster(tmp_path / "traces", write_interval_s=1000.0) as world:
        with pytest.raises(NotFound):
            world.seen()
        gateway = await world.gateway()
        first, second = arrival(1, time.time()), arrival(2, time.time())
        gateway.arrived(first)
        gateway.arrived(second)
        await until(lambda: world.meter.num_requests(WINDOW_S) == 2)
        assert world.seen().output_tokens.tolist() == [1, 1], "nobody has said how long outputs are"
        gateway.record(ended(first, output_tokens=9))
        await gateway.close()
        assert world.writer.status().buffered_rows == 1
        assert world.seen().output_tokens.tolist() == [9, 9], "a row that waits for its file counts, and once"


@pytest.mark.parametrize("status", [429, 503, 499])
async def test_refused_and_abandoned_requests_are_load_and_count_once(tmp_path: Path, status: int) -> None:
    now_s = time.time()
    with cluster(tmp_path) as world:
        gateway = await world.gateway()
        for number in range(30):
            row = arrival(number, now_s - 1 + number * 0.01, adapter="hot")
            gateway.arrived(row)
            gateway.record(ended(row, output_tokens=50) if number < 10 else ended(row, status=status, output_tokens=0))
        over_quota = replace(ended(arrival(99, now_s), status=429, output_tokens=0), prompt_tokens=0)
        gateway.record(over_quota)
        await gateway.close()
        await until(lambda: world.writer.status().written_rows == 31)
        seen = world.seen()
        assert len(seen) == world.meter.num_requests(WINDOW_S) == 30
        assert set(seen.output_tokens.tolist()) == {50}
        assert world.meter.rates(WINDOW_S)[BUSY, "acme", "hot"] == pytest.approx(30 / WINDOW_S)


async def test_what_a_dead_gateway_had_let_in_counts_once_and_passes_with_the_window(tmp_path: Path) -> None:
    now_s = time.time()
    with cluster(tmp_path) as world:
        gateway = await world.gateway()
        rows = [arrival(number, now_s - 2 + number * 0.01) for number in range(20)]
        for row in rows:
            gateway.arrived(row)
        for row in rows[:5]:
            gateway.record(ended(row))
        await until(lambda: world.writer.status().written_rows == 5)
        assert gateway._task is not None
        gateway._task.cancel()  # and nothing more is ever heard of it
        survivor = await world.gateway()
        survivor.record(ended(arrival(500, now_s)))
        await survivor.close()
        assert len(world.seen()) == 21
        later = replace(world.task(), since_s=now_s - 1.905, unwritten=world.writer.unwritten(now_s - 1.905))
        assert len(recent_arrivals(later)) == 21 - 10
        with suppress(asyncio.CancelledError):
            await gateway._task


async def test_at_any_time_each_request_is_seen_exactly_once(tmp_path: Path) -> None:
    """Two gateways, batches that are lost or repeated, files written and merged meanwhile; tasks carried out late."""
    chance = random.Random(3)
    with cluster(tmp_path, write_interval_s=0.002) as world:
        world.fails = lambda: chance.random() < 0.2
        gateways = [await world.gateway() for _ in range(2)]
        told = 0
        begun: list[tuple[TraceRecorder, ArrivalRow]] = []
        tasks: list[tuple[Task, int]] = []
        for number in range(400):
            gateway = gateways[number % 2]
            row = arrival(number, time.time(), adapter=f"a{number % 3}")
            gateway.arrived(row)
            begun.append((gateway, row))
            if len(begun) > 30:
                at, asked = begun.pop(chance.randrange(len(begun)))
                at.record(ended(asked))
            if number % 4 == 0:
                await asyncio.sleep(0.003)
            if number % 40 == 39:
                told = world.meter.num_requests(WINDOW_S)
                tasks.append((world.task(), told))
        for task, at_least in tasks:
            seen = recent_arrivals(task)
            prompts = seen.prompt_tokens.tolist()
            assert len(set(prompts)) == len(prompts), "counted twice"
            assert len(set(prompts)) >= at_least, "what was told of is missing"
        assert told > 0
        for at, asked in begun:
            at.record(ended(asked))
        for gateway in gateways:
            await gateway.close()
        assert sorted(world.seen().prompt_tokens.tolist()) == list(range(100, 500))
        assert world.meter.num_requests(WINDOW_S) == 400


def test_gateways_of_a_release_that_tells_of_no_arrivals_count_by_their_rows(tmp_path: Path) -> None:
    batch = encode_batch([ended(arrival(1, time.time(), adapter="hot"))], source="old", sequence=0)
    end = b"\xff\xff\xff\xff\x00\x00\x00\x00"
    old = batch[: batch.index(end) + len(end)]
    with cluster(tmp_path) as world:
        world.writer.append(old)
        world.meter.add(old)
        assert world.meter.num_requests(WINDOW_S) == 1
        assert len(world.seen()) == 1


def test_outputs_that_are_not_known_are_like_those_of_the_adapter_else_of_the_base() -> None:
    def made(base: int, adapter: int, outputs: list[int]) -> list[tuple[int, int, int]]:
        return [(base, adapter, output) for output in outputs]

    known = [*made(0, 0, [10, 30] * 15), *made(0, 1, [500] * 3), *made(1, -1, [70] * 25)]
    unknown = [*made(0, 0, [-1, 0] * 200), *made(0, 1, [-1] * 60), *made(1, 2, [-1]), *made(2, -1, [0])]
    base, adapter, output = (np.array(column, dtype=np.int32) for column in zip(*known, *unknown, strict=True))
    arrivals = Arrivals(
        origin_s=0.0,
        arrival_s=np.arange(len(base), dtype=np.float64),
        adapter=adapter,
        base_model=base,
        tenant=np.zeros_like(base),
        prompt_tokens=np.ones_like(base),
        output_tokens=output,
        adapters=tuple(AdapterName("acme", "b", str(number)) for number in range(3)),
        base_models=("a", "b", "c"),
        tenants=("acme",),
    )
    likely = with_likely_outputs(arrivals)
    num_known = len(known)
    assert np.array_equal(likely[:num_known], output[:num_known])
    of_adapter, rest = likely[num_known : num_known + 400], likely[num_known + 400 :]
    assert set(of_adapter.tolist()) == {10, 30}
    assert of_adapter.mean() == pytest.approx(20, abs=2)
    assert set(rest[:60].tolist()) <= {10, 30, 500}, "three requests of its own say little"
    assert len(set(rest[:60].tolist())) > 1
    assert rest[60] == 70
    assert rest[61] in output[:num_known]
    assert np.array_equal(with_likely_outputs(arrivals), likely)
