"""One replica of a fleet as a process: ``python -m loraplex.bench.fleet.replica``, driven over its standard input.

A line of JSON in, a line out: first ``ReplicaStart`` and ``ReplicaReady``, then ``StageAdapters`` and
``AdaptersStaged``, or ``TakeSteps`` and ``Samples``. It ends with its input. Requests and tokens go over the stream
server, as everywhere. Started by ``replicas``.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import msgspec
import torch

from loraplex.bench.random_adapters import random_manifests
from loraplex.bench.recorder import RecordingEngine
from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import LoraplexError, NotFound
from loraplex.core.ids import BaseModelId, Digest, ReplicaId
from loraplex.core.plan import Shape
from loraplex.core.step import Executor
from loraplex.core.switching import switch_often
from loraplex.cost.samples import Samples
from loraplex.engine import EngineConfig
from loraplex.model_runner.build import build_executor
from loraplex.model_runner.config import ExecutorConfig
from loraplex.model_runner.executor_base import ExecutorBase
from loraplex.model_runner.turns.executor import TurnExecutor
from loraplex.model_runner.turns.queue import TurnQueue
from loraplex.replica.config import ReplicaConfig
from loraplex.replica.engine_loop import EngineLoop
from loraplex.replica.server import ReplicaServer

HOST = "127.0.0.1"
_STAGING_THREADS = 8


class ReplicaStart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    replica_id: str
    base: str
    model: str
    executor: ExecutorConfig
    engine: EngineConfig
    secret: str
    """Of the stream server."""
    turns: str | None = None
    """File by which the replicas of the group take turns; None: it is alone there."""
    num_replicas: int = 1
    """Of the group."""
    records_steps: bool = False
    """For ``TakeSteps``: a few clock reads a step."""


class ReplicaReady(msgspec.Struct, frozen=True, kw_only=True):
    port: int
    device_name: str
    torch_version: str
    error: str | None = None
    """It could not start; it ends."""


class StageAdapters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    lora_ranks: list[int]
    """Of all adapters of the base."""
    chosen: list[int]
    """Indices of those that this replica may be asked for."""


class TakeSteps(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The steps since the last such message, to a replica that records them and has nothing to do."""

    lora_ranks: list[int]
    """Of all adapters of the base."""


class AdaptersStaged(msgspec.Struct, frozen=True, kw_only=True):
    num_staged: int
    """By this message."""
    error: str | None = None


def manifests_of(executor: Executor, lora_ranks: list[int]) -> tuple[AdapterManifest, ...]:
    """The made-up adapters of a base; equal for equal arguments."""
    if not lora_ranks:
        return ()
    return random_manifests(executor.model, count=len(lora_ranks), lora_ranks=lora_ranks)


class StagedAdapters:
    """An ``ArtifactSource`` of adapters that are in host memory already: nothing is read."""

    def __init__(self, executor: ExecutorBase) -> None:
        self._executor = executor
        self._manifests: dict[Digest, AdapterManifest] = {}

    def stage(self, message: StageAdapters) -> int:
        """Puts those that are not there into host memory; returns how many. Blocks."""
        manifests = manifests_of(self._executor, message.lora_ranks)
        missing = [manifests[i] for i in message.chosen if manifests[i].digest not in self._manifests]

        def stage(manifest: AdapterManifest) -> None:
            self._executor.stage_random_adapter(manifest, int(manifest.digest[:15], 16))

        with ThreadPoolExecutor(_STAGING_THREADS) as threads:
            for manifest, _ in zip(missing, threads.map(stage, missing), strict=True):
                self._manifests[manifest.digest] = manifest
        return len(missing)

    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        manifest = self._manifests.get(digest)
        if manifest is None:
            raise NotFound(f"adapter {digest} was not staged on this replica")
        yield manifest, ""


async def serve(start: ReplicaStart, lines: BinaryIO, answers: BinaryIO) -> None:
    """Until the input ends."""

    def answer(message: msgspec.Struct) -> None:
        answers.write(msgspec.json.encode(message) + b"\n")
        answers.flush()

    try:
        executor = build_executor(start.executor, model=start.model, base_model_id=BaseModelId(start.base))
    except LoraplexError as error:
        answer(ReplicaReady(port=0, device_name="", torch_version="", error=error.message))
        return
    driven: Executor = executor
    if start.turns is not None:
        driven = TurnExecutor(executor, TurnQueue(start.turns, num_places=start.num_replicas))
    adapters = StagedAdapters(executor)
    config = ReplicaConfig(stop_grace_s=0.0)
    engine = None
    if start.records_steps:
        shape = Shape(tp=start.executor.tp, pp=start.executor.pp)
        engine = RecordingEngine(start.engine, driven, itemsize=executor.itemsize, shape=shape)
    loop = EngineLoop(
        replica_id=ReplicaId(start.replica_id),
        executor=driven,
        engine_config=start.engine,
        source=adapters,
        config=config,
        engine=engine,
    )
    loop.start()
    threading.Thread(target=_end_with, args=(loop,), daemon=True).start()
    server = ReplicaServer(loop, cluster_secret=start.secret, config=config)
    port = await server.start(HOST)
    answer(ReplicaReady(port=port, device_name=_device_name(start.executor), torch_version=str(torch.__version__)))
    while line := await asyncio.to_thread(lines.readline):
        message = msgspec.json.decode(line, type=StageAdapters | TakeSteps)
        if isinstance(message, TakeSteps):
            assert engine is not None
            answer(_taken(engine, manifests_of(executor, message.lora_ranks)))
            continue
        try:
            staged = await asyncio.to_thread(adapters.stage, message)
        except LoraplexError as error:
            answer(AdaptersStaged(num_staged=0, error=error.message))
        else:
            answer(AdaptersStaged(num_staged=staged))
    await server.stop()
    await asyncio.to_thread(loop.join)


def _taken(engine: RecordingEngine, manifests: tuple[AdapterManifest, ...]) -> Samples:
    steps = Samples.of(engine.composition(manifests), engine.step_seconds())
    engine.clear()
    return steps


def _end_with(loop: EngineLoop) -> None:
    """An engine that broke ends the process: what waits for input would not notice."""
    try:
        loop.join()
    except BaseException:
        # The loop has told of it.
        os._exit(1)


def _device_name(config: ExecutorConfig) -> str:
    if config.device.startswith("cuda"):
        return torch.cuda.get_device_name(config.device)
    return "cpu"


def main() -> None:
    switch_often()
    # What libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines = sys.stdin.buffer
    if line := lines.readline():
        asyncio.run(serve(msgspec.json.decode(line, type=ReplicaStart), lines, answers))


if __name__ == "__main__":
    main()
