"""What becomes of a group whose ranks die, hang or cannot start: everybody hears of it soon, and nothing is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import BadAdapter, BadConfig, Conflict, ExecutorLost, NotFound
from loraplex.core.ids import BaseModelId, Digest, ReplicaId
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.core.step import Row, RowStart, StepPlan
from loraplex.core.wire import ReplicaFrame
from loraplex.engine import EngineConfig
from loraplex.model_runner import ExecutorBase, ExecutorConfig, build_executor
from loraplex.model_runner.ranks.channel import connect
from loraplex.model_runner.ranks.launcher import RankProcess, RankStart
from loraplex.model_runner.ranks.local import LocalLauncher
from loraplex.model_runner.ranks.messages import Hello, StartFailed
from loraplex.replica.engine_loop import EngineLoop
from loraplex.testing.steps import run_step

from tests.model_runner.parallel_models import (
    BASE,
    Adapter,
    load_model_spec_of,
    make_requests,
    write_adapters,
    write_model,
)

pytestmark = pytest.mark.alone

TIMEOUT_S = 3.0
"""Of tests that wait for it; others must not be ended by a machine that is busy."""


class NoArtifacts:
    def open(self, digest: Digest) -> AbstractContextManager[tuple[AdapterManifest, str]]:
        raise NotFound(f"no adapter {digest}")


class RecordingLauncher(LocalLauncher):
    def __init__(self) -> None:
        super().__init__()
        self.processes: list[RankProcess] = []

    def launch(self, start: RankStart) -> RankProcess:
        self.processes.append(super().launch(start))
        return self.processes[-1]

    def pid(self, rank: int) -> int:
        pid = self.processes[rank]._process.pid  # type: ignore[attr-defined]
        assert isinstance(pid, int)
        return pid


@contextmanager
def group(
    *, tp: int = 2, pp: int = 1, timeout_s: float = 60.0, model: str = "random:tiny-llama"
) -> Iterator[tuple[ExecutorBase, RecordingLauncher]]:
    launcher = RecordingLauncher()
    config = ExecutorConfig(tp=tp, pp=pp, num_pages=80, page_size=4, num_threads=1, rank_timeout_s=timeout_s)
    executor = build_executor(config, model=model, base_model_id=BASE, launcher=launcher)
    try:
        yield executor, launcher
    finally:
        executor.close()
    assert all(process.ended() is not None for process in launcher.processes), "a rank outlived its group"


def prompt_step(step_id: int = 1, *, adapter: Digest | None = None) -> StepPlan:
    sampling = SamplingParams(max_tokens=4, seed=0, temperature=0.0)
    start = RowStart(slot=0, sampling=sampling, token_ids=(3, 5, 7), num_prompt_tokens=3)
    row = Row(slot=0, token_ids=(3, 5, 7), start=0, pages=[9], adapter=adapter, samples=True)
    return StepPlan(step_id=step_id, releases=(), starts=(start,), rows=(row,))


def noticed_s(call: Callable[[], object]) -> float:
    """Seconds until ``call``, again and again, raises ExecutorLost."""
    began_s = time.monotonic()
    while True:
        try:
            call()
        except ExecutorLost:
            return time.monotonic() - began_s
        assert time.monotonic() - began_s < 10
        time.sleep(0.02)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_rank_that_is_killed_is_noticed_at_once_by_who_waits_and_by_who_asks(tp: int, pp: int) -> None:
    with group(tp=tp, pp=pp) as (executor, launcher):
        run_step(executor, prompt_step(1))
        os.kill(launcher.pid(1), signal.SIGSTOP)
        executor.submit(prompt_step(2))
        threading.Timer(0.2, os.kill, (launcher.pid(1), signal.SIGKILL)).start()
        with pytest.raises(ExecutorLost, match="rank 1 ended: killed by signal 9"):
            executor.collect()
        assert noticed_s(executor.check) < 1
        for call in (lambda: executor.submit(prompt_step(3)), lambda: executor.unstage_adapter(Digest("a"))):
            with pytest.raises(ExecutorLost):
                call()


def test_an_idle_group_whose_rank_stops_is_lost_within_its_timeout() -> None:
    with group(timeout_s=TIMEOUT_S) as (executor, launcher):
        time.sleep(1.2 * TIMEOUT_S)
        executor.check()
        os.kill(launcher.pid(0), signal.SIGSTOP)
        assert noticed_s(executor.check) < TIMEOUT_S + 2
        with pytest.raises(ExecutorLost, match="rank 0 has been silent"):
            executor.check()


def test_a_step_that_gets_nowhere_ends_the_group_though_all_ranks_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    with group(timeout_s=TIMEOUT_S) as (executor, _):
        run_step(executor, prompt_step(1))
        # The other shard never hears of the step: the first waits for it in a sum.
        monkeypatch.setattr(executor._group._commands[1], "send_bytes", lambda _: None)  # type: ignore[attr-defined]
        executor.submit(prompt_step(2))
        began_s = time.monotonic()
        with pytest.raises(ExecutorLost, match="no progress"):
            executor.collect()
        assert time.monotonic() - began_s < TIMEOUT_S + 2


def test_a_replica_ends_when_its_group_is_lost_while_nobody_asks_anything() -> None:
    launcher = RecordingLauncher()
    config = ExecutorConfig(tp=2, num_pages=80, num_threads=1)
    executor = build_executor(config, model="random:tiny-llama", base_model_id=BASE, launcher=launcher)
    loop = EngineLoop(replica_id=ReplicaId("r"), executor=executor, engine_config=EngineConfig(), source=NoArtifacts())
    ended = threading.Event()
    loop.connect(lambda frames: None, on_end=ended.set)
    loop.start()
    os.kill(launcher.pid(1), signal.SIGKILL)
    assert ended.wait(5)
    with pytest.raises(ExecutorLost, match="rank 1"):
        loop.join()


class Files:
    """An ArtifactSource of files at hand."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = {adapter.manifest.digest: adapter for adapter in adapters}

    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        adapter = self.adapters[digest]
        yield adapter.manifest, adapter.path


def serve(executor: ExecutorBase, adapters: Sequence[Adapter], requests: tuple[EngineRequest, ...]) -> dict[str, Any]:
    """Tokens of each request, through the engine loop of a replica."""
    loop = EngineLoop(
        replica_id=ReplicaId("r"), executor=executor, engine_config=EngineConfig(max_running=4), source=Files(adapters)
    )
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    running = set(tokens)
    ended = threading.Event()

    def deliver(frames: dict[int, ReplicaFrame]) -> None:
        for output in (output for frame in frames.values() for output in frame.outputs):
            assert output.error is None
            tokens[output.request_id] += [token.token_id for token in output.tokens]
            if output.finish_reason is not None:
                running.discard(output.request_id)
        if not running:
            ended.set()

    loop.connect(deliver, on_end=ended.set)
    loop.start()
    loop.open_session(1)
    loop.submit(1, requests)
    assert ended.wait(120)
    loop.stop()
    loop.join()
    return tokens


def test_a_replica_serves_from_a_group_what_it_serves_from_one_rank(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3")
    adapters = write_adapters(tmp_path, load_model_spec_of(tmp_path / "model"))
    requests = tuple(make_requests(adapters, count=6, output_tokens=6))
    served = []
    for tp, pp in ((1, 1), (2, 1)):
        config = ExecutorConfig(tp=tp, pp=pp, num_pages=300, page_size=4, num_threads=1)
        served.append(serve(build_executor(config, model=model, base_model_id=BASE), adapters, requests))
    assert served[0] == served[1]
    assert all(len(tokens) == 6 for tokens in served[0].values())


def test_what_a_rank_cannot_load_is_told_as_it_is_on_one_rank(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not safetensors")
    config = ExecutorConfig(tp=2, num_pages=8, num_threads=1)
    with pytest.raises(BadConfig, match="not a readable safetensors file"):
        build_executor(config, model=model, base_model_id=BASE)


def test_a_rank_that_does_not_come_up_is_named() -> None:
    class Ended:
        def ended(self) -> str | None:
            return "exit code 3"

        def kill(self) -> None:
            pass

    class Failing(RecordingLauncher):
        def launch(self, start: RankStart) -> RankProcess:
            return Ended() if start.rank == 1 else super().launch(start)

    launcher = Failing()
    config = ExecutorConfig(tp=2, num_pages=8, num_threads=1)
    with pytest.raises(ExecutorLost, match="rank 1 ended: exit code 3"):
        build_executor(config, model="random:tiny-llama", base_model_id=BASE, launcher=launcher)
    assert launcher.processes[0].ended() is not None, "the other rank outlived the failure"


def test_a_rank_that_refuses_to_start_is_heard_although_the_first_waits_for_it() -> None:
    class Running:
        def ended(self) -> str | None:
            return None

        def kill(self) -> None:
            done.set()

    def refuse(start: RankStart) -> None:
        with connect(start.address, start.key) as commands:
            commands.send_bytes(msgspec.msgpack.encode(Hello(start.rank, events=False)))
            with connect(start.address, start.key) as events:
                events.send_bytes(msgspec.msgpack.encode(Hello(start.rank, events=True)))
                commands.recv_bytes()
                refusal = BadConfig("there is no such device")
                commands.send_bytes(msgspec.msgpack.encode(StartFailed(refusal.class_code, refusal.message)))
                done.wait()

    class Refusing(RecordingLauncher):
        def launch(self, start: RankStart) -> RankProcess:
            if start.rank == 0:
                return super().launch(start)
            threading.Thread(target=refuse, args=(start,), daemon=True).start()
            return Running()

    done = threading.Event()
    launcher = Refusing()
    config = ExecutorConfig(tp=2, num_pages=8, num_threads=1)
    with pytest.raises(BadConfig, match="there is no such device"):
        build_executor(config, model="random:tiny-llama", base_model_id=BASE, launcher=launcher)
    assert done.is_set()
    assert launcher.processes[0].ended() is not None, "the rank that waited outlived the failure"


def test_adapters_that_cannot_be_staged_leave_the_group_well(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    adapter, other, *_ = write_adapters(tmp_path, load_model_spec_of(tmp_path / "model"))
    manifest = adapter.manifest
    with group(tp=1, pp=2, model=model) as (executor, _):
        with pytest.raises(NotFound):
            executor.stage_adapter(manifest, str(tmp_path / "gone.safetensors"))
        with pytest.raises(BadAdapter, match="expected"):
            executor.stage_adapter(other.manifest, adapter.path)
        with pytest.raises(BadAdapter, match="for another"):
            executor.stage_adapter(
                AdapterManifest(
                    digest=manifest.digest,
                    base_model_id=BaseModelId("another"),
                    blocks=manifest.blocks,
                    num_bytes=manifest.num_bytes,
                ),
                adapter.path,
            )
        pages = tuple(range(10, 10 + executor.adapter_pages(manifest)))
        with pytest.raises(Conflict, match="not staged"):
            executor.load_adapter(manifest.digest, pages)
        executor.stage_adapter(manifest, adapter.path)
        with pytest.raises(Conflict, match="takes"):
            executor.load_adapter(manifest.digest, pages[:-1])
        executor.load_adapter(manifest.digest, pages)
        with pytest.raises(Conflict, match="already loaded"):
            executor.load_adapter(manifest.digest, pages)
        with_adapter = run_step(executor, prompt_step(1, adapter=manifest.digest))
        executor.unstage_adapter(manifest.digest)
        again = run_step(executor, prompt_step(2, adapter=manifest.digest))
        assert [token.token_id for token in again.tokens] == [token.token_id for token in with_adapter.tokens]
        executor.drop_adapter(manifest.digest)
        with pytest.raises(Conflict, match="not loaded"):
            executor.submit(prompt_step(3, adapter=manifest.digest))
        executor.stage_adapter(manifest, adapter.path)
        executor.load_adapter(manifest.digest, pages)
        assert run_step(executor, prompt_step(4, adapter=manifest.digest)).tokens == again.tokens


@pytest.mark.slow
def test_ranks_end_when_the_process_that_drives_them_is_killed() -> None:
    program = """
import time
from tests.model_runner.test_parallel_ranks import group, prompt_step
if __name__ == "__main__":
    with group() as (executor, launcher):
        executor.submit(prompt_step())
        executor.collect()
        print(launcher.pid(0), launcher.pid(1), flush=True)
        time.sleep(60)
"""
    root = Path(__file__).parents[2]
    path = {"PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, **path}, text=True, cwd=root
    ) as driver:
        assert driver.stdout is not None
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 2
        driver.kill()
        until_s = time.monotonic() + 10
        while any(_runs(pid) for pid in pids):
            assert time.monotonic() < until_s, "a rank outlived its driver"
            time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
