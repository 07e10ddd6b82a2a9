"""The body of a rank process: becomes the shard that it is told to be, and runs what the group's executor sends.

The main thread takes commands in their order; a step is computed there, or handed to the GPU, which may hold a second
one. Staging, which has threads of its own, starts between steps. A beat every second says that the process lives and
how far it is. Whatever goes wrong in a step ends the process: its peers wait in an exchange that cannot be completed,
so the group is lost.
"""

import logging
import os
import select
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import NoReturn

import msgspec
import torch

from loraplex.core.adapter import AdapterManifest
from loraplex.core.collector import exempt_loaded
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import Digest
from loraplex.core.plan import Shape
from loraplex.core.step import StepPlan
from loraplex.model_runner.arena import plan_num_pages
from loraplex.model_runner.build import build_rank, load_model_spec, load_weights, rank_device, rank_dtype
from loraplex.model_runner.executor_base import ExecutorBase
from loraplex.model_runner.rank_executor import RankExecutor
from loraplex.model_runner.ranks.channel import connect
from loraplex.model_runner.ranks.exchange import Exchange
from loraplex.model_runner.ranks.launcher import OpenAdapter, RankStart
from loraplex.model_runner.ranks.messages import (
    Ahead,
    Allocate,
    Beat,
    Begin,
    Command,
    Drop,
    Failed,
    Hello,
    Load,
    RankJob,
    Ready,
    Room,
    Stage,
    Staged,
    StartFailed,
    Step,
    StepDone,
    Unstage,
)
from loraplex.model_runner.ranks.step_codec import StepDecoder
from loraplex.model_runner.shard import Shard, plan_shards

_BEAT_S = 1.0
_GLANCE_S = 5e-5
"""While a step runs on the GPU: how long to wait for a command before looking at the step again."""
_STAGING_THREADS = 4

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.encode
_command = msgspec.msgpack.Decoder(Command)


def _on_this_machine(_manifest: AdapterManifest, path: str) -> AbstractContextManager[str]:
    return nullcontext(path)


def run_rank(start: RankStart, open_adapter: OpenAdapter = _on_this_machine) -> NoReturn:
    """Ends with its process: when the group's executor is gone, or something fails. ``open_adapter``: where adapter
    files are; by default where the group's executor has them."""
    try:
        commands = connect(start.address, start.key)
        commands.send_bytes(_encode(Hello(start.rank, events=False)))
        events = connect(start.address, start.key)
        events.send_bytes(_encode(Hello(start.rank, events=True)))
        job = msgspec.msgpack.decode(commands.recv_bytes(), type=RankJob)
    except (OSError, EOFError, AuthenticationError):
        # Whoever wanted this rank is gone.
        os._exit(1)
    worker = _Worker(start, job, commands, events, open_adapter)
    try:
        worker.run()
    except (ConnectionError, EOFError):
        os._exit(1)
    except BaseException as error:
        _log.exception("rank %d failed", start.rank)
        worker.tell(Failed(f"{type(error).__name__}: {error}"))
    # Not by way of torch's and the threads' own ends, which wait for peers that may be gone.
    os._exit(1)


class _Worker:
    def __init__(
        self, start: RankStart, job: RankJob, commands: Connection, events: Connection, open_adapter: OpenAdapter
    ) -> None:
        self._start = start
        self._open_adapter = open_adapter
        self._job = job
        self._commands = commands
        self._events = events
        self._events_lock = threading.Lock()
        self._exchange: Exchange | None = None
        self._num_collected = 0
        self._decoder = StepDecoder()
        self._num_pages: dict[Digest, int] = {}

    def run(self) -> NoReturn:
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        try:
            shard, executor = self._become()
        except LoraplexError as error:
            self._commands.send_bytes(_encode(StartFailed(error.class_code, error.message)))
            # The other side kills what it started.
            threading.Event().wait()
            raise
        speaks = shard.is_last and shard.tp_rank == 0
        num_in_flight = 0
        ahead: StepPlan | None = None
        # Not waited for at the end, which is the process's: what else is to be staged would keep a failure back.
        threads = ThreadPoolExecutor(_STAGING_THREADS, initializer=_thread_start(executor))
        while True:
            if num_in_flight and (num_in_flight == executor.max_in_flight or not self._hears_before(executor)):
                self._collect(executor, speaks)
                num_in_flight -= 1
                continue
            message = _command.decode(self._commands.recv_bytes())
            match message:
                case Step():
                    executor.submit(self._decoder.decode(message))
                    num_in_flight += 1
                case Ahead():
                    ahead = self._decoder.decode(message.step)
                    executor.prepare(ahead)
                case Begin():
                    assert ahead is not None, "a step comes before it begins"
                    executor.submit(ahead)
                    num_in_flight += 1
                    ahead = None
                case Load():
                    executor.load_adapter(message.digest, message.pages[: self._num_pages[message.digest]])
                    self._decoder.name_adapter(message.number, message.digest)
                case Drop():
                    executor.drop_adapter(message.digest)
                    self._decoder.forget_adapter(message.number)
                case Stage():
                    threads.submit(self._stage, executor, message)
                case Unstage():
                    executor.unstage_adapter(message.digest)
                case Allocate():
                    raise AssertionError("a rank has one arena")

    def _hears_before(self, executor: RankExecutor) -> bool:
        """A command comes before the oldest step in flight has ended."""
        while not executor.ready():
            # Not the connection's poll, which rounds up to milliseconds.
            if select.select([self._commands], [], [], _GLANCE_S)[0]:
                return True
        return False

    def _collect(self, executor: RankExecutor, speaks: bool) -> None:
        result = executor.collect()
        self._num_collected += 1
        if not speaks:
            return
        detailed = any(token.logprob is not None for token in result.tokens)
        token_ids = [token.token_id for token in result.tokens]
        self._commands.send_bytes(_encode(StepDone(result.step_id, token_ids, result.tokens if detailed else ())))

    def tell(self, event: Beat | Staged | Failed) -> None:
        """Any thread. A group's executor that is gone hears nothing."""
        with self._events_lock:
            try:
                self._events.send_bytes(_encode(event))
            except OSError:
                os._exit(1)

    def _become(self) -> tuple[Shard, RankExecutor]:
        job, config = self._job, self._job.config
        assert config.stage_layers is not None, "the cut comes with the job"
        assert config.page_size is not None, "so does the size of a page"
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        start = self._start
        device = rank_device(config, start.rank if start.device_index is None else start.device_index)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dtype = rank_dtype(config, device)
        spec = load_model_spec(job.model, job.base_model_id)
        shape = Shape(tp=config.tp, pp=config.pp)
        shard = plan_shards(spec, shape, config.stage_layers)[start.rank]
        self._exchange = Exchange(
            shard,
            host=start.address[0],
            store_port=job.store_port,
            device=device,
            dtype=dtype,
            max_in_flight=shape.pp + (device.type != "cpu"),
        )
        weights = load_weights(job.model, shard, dtype=dtype, device=device)
        num_pages = plan_num_pages(config, shard.local, dtype=dtype, device=device, stage=shard.stage)
        self._commands.send_bytes(_encode(Room(num_pages)))
        allocate = _command.decode(self._commands.recv_bytes())
        assert isinstance(allocate, Allocate), "the arena comes first"
        executor = build_rank(
            config, shard, weights, num_pages=allocate.num_pages, dtype=dtype, device=device, peers=self._exchange
        )
        exempt_loaded()
        self._commands.send_bytes(_encode(Ready()))
        return shard, executor

    def _stage(self, executor: ExecutorBase, message: Stage) -> None:
        manifest = message.manifest
        try:
            if message.path is None:
                executor.stage_random_adapter(manifest, message.seed)
            else:
                with self._open_adapter(manifest, message.path) as path:
                    executor.stage_adapter(manifest, path)
            self._num_pages[manifest.digest] = executor.adapter_pages(manifest)
        except LoraplexError as error:
            self.tell(Staged(message.request, error.class_code, error.message))
        except Exception as error:
            _log.exception("rank %d could not stage %s", self._start.rank, manifest.digest)
            self.tell(Staged(message.request, LoraplexError.code, f"{type(error).__name__}: {error}"))
        else:
            self.tell(Staged(message.request))

    def _beat(self) -> None:
        pause = threading.Event()
        while True:
            # Captured graphs exchange without being counted.
            progress = self._num_collected + (self._exchange.progress if self._exchange is not None else 0)
            self.tell(Beat(progress))
            pause.wait(_BEAT_S)


def _thread_start(executor: RankExecutor) -> Callable[[], None] | None:
    """What a thread must do first, so that the memory that it pins belongs to the rank's GPU."""
    device = executor.device
    return partial(torch.cuda.set_device, device) if device.type == "cuda" else None
