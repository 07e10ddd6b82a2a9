"""What the messages of a step cost: plan to all ranks and tokens back, with no step computed in between.

Real connections and processes, decode steps with long page tables. Called by ``python -m loraplex.model_runner.ranks``.
"""

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from loraplex.core.ids import Digest
from loraplex.core.step import Row, StepPlan
from loraplex.model_runner.ranks.channel import RankListener, connect
from loraplex.model_runner.ranks.messages import Command, Step, StepDone
from loraplex.model_runner.ranks.step_codec import StepDecoder, StepEncoder

_PAGE_SIZE = 16
_CONTEXT_TOKENS = 1024
_NUM_ADAPTERS = 64
_WARM_STEPS = 20

_encode = msgspec.msgpack.encode
_command = msgspec.msgpack.Decoder(Command)
_done = msgspec.msgpack.Decoder(StepDone)


class MessageCost(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the steps of a run, in microseconds."""

    ranks: int
    rows: int
    adapters: int
    step_bytes: int
    encode_us: float
    """On the engine's thread."""
    send_us: float
    """To all ranks."""
    decode_us: float
    """On a rank."""
    round_trip_us: float
    """From the plan in hand to its tokens in hand: all of the above, the way, and the answer."""


def measure_message_cost(*, num_ranks: int, num_rows: int, num_steps: int) -> MessageCost:
    """Decode steps of ``num_rows`` rows over up to 64 adapters, each with a page table of 64 pages and more."""
    listener = RankListener("127.0.0.1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [
        context.Process(target=_answer, args=(listener.address, listener.key), daemon=True) for _ in range(num_ranks)
    ]
    for process in processes:
        process.start()
    connections: list[Connection] = []
    while len(connections) < num_ranks:
        connection = listener.accept(30)
        if connection is None:
            raise TimeoutError("a rank did not come")
        connections.append(connection)
    try:
        return _measure(connections, num_rows=num_rows, num_steps=num_steps)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()
        listener.close()


def _measure(connections: list[Connection], *, num_rows: int, num_steps: int) -> MessageCost:
    encoder, decoder = StepEncoder(), StepDecoder()
    numbers = {Digest(f"{index:064d}"): index for index in range(min(_NUM_ADAPTERS, num_rows))}
    for digest, number in numbers.items():
        decoder.name_adapter(number, digest)
    digests = sorted(numbers)
    tables = [list(range(_CONTEXT_TOKENS // _PAGE_SIZE)) for _ in range(num_rows)]
    encode_s, send_s, decode_s, round_trip_s = [], [], [], []
    size = 0
    for step_id in range(1, _WARM_STEPS + num_steps + 1):
        plan = _decode_plan(step_id, tables, digests)
        started_s = time.perf_counter()
        step = encoder.encode(plan, numbers)
        data = _encode(step)
        encoded_s = time.perf_counter()
        for connection in connections:
            connection.send_bytes(data)
        sent_s = time.perf_counter()
        done = _done.decode(connections[-1].recv_bytes())
        ended_s = time.perf_counter()
        assert len(done.token_ids) == num_rows, "a row is missing"
        size = len(data)
        decoding_s = time.perf_counter()
        decoded = _command.decode(data)
        assert isinstance(decoded, Step)
        decoder.decode(decoded)
        decode_s.append(time.perf_counter() - decoding_s)
        encode_s.append(encoded_s - started_s)
        send_s.append(sent_s - encoded_s)
        round_trip_s.append(ended_s - started_s)

    def median_us(seconds: list[float]) -> float:
        return 1e6 * statistics.median(seconds[_WARM_STEPS:])

    return MessageCost(
        ranks=len(connections),
        rows=num_rows,
        adapters=len(numbers),
        step_bytes=size,
        encode_us=median_us(encode_s),
        send_us=median_us(send_s),
        decode_us=median_us(decode_s),
        round_trip_us=median_us(round_trip_s),
    )


def _decode_plan(step_id: int, tables: list[list[int]], digests: list[Digest]) -> StepPlan:
    """Every row one token on; a sixteenth of the rows takes a page."""
    rows = []
    for slot, table in enumerate(tables):
        position = _CONTEXT_TOKENS + step_id + slot % _PAGE_SIZE - 1
        if position // _PAGE_SIZE >= len(table):
            table.append(len(table) + 1000 * slot)
        rows.append(
            Row(
                slot=slot,
                token_ids=(50_000 + slot,),
                start=position,
                pages=table,
                adapter=digests[slot * len(digests) // len(tables)],
                samples=True,
            )
        )
    return StepPlan(step_id=step_id, releases=(), starts=(), rows=tuple(rows))


def _answer(address: tuple[str, int], key: bytes) -> Any:
    """A rank that computes nothing; ends when the other side is gone."""
    connection = connect(address, key)
    decoder = StepDecoder()
    for index in range(_NUM_ADAPTERS):
        decoder.name_adapter(index, Digest(f"{index:064d}"))
    while True:
        try:
            step = _command.decode(connection.recv_bytes())
            assert isinstance(step, Step)
            plan = decoder.decode(step)
            connection.send_bytes(_encode(StepDone(plan.step_id, [row.slot for row in plan.rows if row.samples])))
        except (EOFError, OSError):
            os._exit(0)
