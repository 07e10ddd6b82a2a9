"""The running replicas of a plan: starts their processes, all at once, stages adapters, knows their routes, ends them.

Called by ``measure``.
"""

import dataclasses
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import msgspec

from loraplex.bench.fleet.options import Experiment, FleetBase
from loraplex.bench.fleet.prepared import Cell, Workload
from loraplex.bench.fleet.replica import HOST, AdaptersStaged, ReplicaReady, ReplicaStart, StageAdapters, TakeSteps
from loraplex.core.control import ReplicaRoute
from loraplex.core.errors import BadConfig, LoraplexError
from loraplex.core.ids import BaseModelId, ReplicaId
from loraplex.core.plan import BasePlacement, GroupPlan
from loraplex.cost.memory import PAGE_TOKENS
from loraplex.cost.samples import Samples
from loraplex.model_runner.build import group_page_tokens, load_model_spec
from loraplex.model_runner.config import ExecutorConfig

_STOP_S = 30.0
_T = TypeVar("_T")


def layout_of(cell: Cell) -> object:
    """Equal where the same replicas serve both cells: all but the sets of adapters."""
    groups = tuple(
        dataclasses.replace(group, bases=tuple(dataclasses.replace(placed, adapters=()) for placed in group.bases))
        for group in cell.plan.groups
    )
    return groups, tuple(map(tuple, cell.pages))


def executor_config(
    experiment: Experiment, group: GroupPlan, base: FleetBase, *, pages: int, first_device: int
) -> ExecutorConfig:
    """Of the replica of ``base`` in ``group``. ``pages``: of its arena, as the simulator counts them; the executor's
    own may be larger and are so many fewer."""
    engine = experiment.replica_engine
    config = ExecutorConfig(
        device="cpu" if experiment.device == "cpu" else f"{experiment.device}:{first_device}",
        tp=group.shape.tp,
        pp=group.shape.pp,
        num_threads=experiment.threads,
        max_rows=engine.max_running,
        max_step_tokens=engine.max_step_tokens,
    )
    page_tokens = group_page_tokens(config, load_model_spec(base.model, BaseModelId(base.name)))
    filled_in = {"dtype": experiment.dtype, "num_pages": pages * PAGE_TOKENS // page_tokens}
    return msgspec.convert({**msgspec.structs.asdict(config), **filled_in}, ExecutorConfig)


class FleetReplicas:
    """Context manager: the processes end with it."""

    def __init__(self, experiment: Experiment, cell: Cell, *, record_steps: bool = False) -> None:
        """Starts them; their devices are taken one after the other, in the order of the groups. BadConfig when one
        says that its options are wrong; LoraplexError when one ends."""
        self._experiment = experiment
        self._records_steps = record_steps
        self.secret = secrets.token_hex(16)
        self._folder = tempfile.TemporaryDirectory(prefix="loraplex-turns-")
        self._processes: list[_Process] = []
        """In the order of the plan."""
        try:
            self._start_all(cell)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "FleetReplicas":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def device_name(self) -> str:
        return self._processes[0].ready.device_name

    @property
    def process_ids(self) -> tuple[int, ...]:
        return tuple(process.process_id for process in self._processes)

    @property
    def torch_version(self) -> str:
        return self._processes[0].ready.torch_version

    def routes(self, cell: Cell) -> tuple[ReplicaRoute, ...]:
        """With the adapter sets of ``cell``, whose layout is that of these replicas."""
        placed = [(group, base) for group in cell.plan.groups for base in group.bases]
        return tuple(
            ReplicaRoute(
                replica_id=ReplicaId(process.name),
                base_model_id=base.base_model_id,
                address=f"{HOST}:{process.ready.port}",
                group=group.name,
                shape=group.shape,
                gpu=group.gpu,
                adapters=base.adapters,
            )
            for process, (group, base) in zip(self._processes, placed, strict=True)
        )

    def stage(self, cell: Cell, workload: Workload) -> int:
        """Each adapter into the host memory of every replica that may be asked for it, on all at once; how many were
        not there yet."""
        placed = [base for group in cell.plan.groups for base in group.bases]
        for process, base in zip(self._processes, placed, strict=True):
            listed = {
                (share.tenant, share.name)
                for p in placed
                if p.base_model_id == base.base_model_id
                for share in p.adapters
            }
            own = {(share.tenant, share.name) for share in base.adapters}
            names = [(tenant, name) for tenant, of, name, _ in workload.adapters if of == base.base_model_id]
            process.tell(
                StageAdapters(
                    lora_ranks=adapter_ranks(workload, base.base_model_id),
                    chosen=[i for i, name in enumerate(names) if name in own or name not in listed],
                )
            )
        count = 0
        for process in self._processes:
            staged = process.answer(AdaptersStaged)
            if staged.error is not None:
                raise LoraplexError(f"{process.name}: {staged.error}")
            count += staged.num_staged
        return count

    def take_steps(self, cell: Cell, workload: Workload) -> dict[ReplicaId, Samples]:
        """What each replica did since this was last asked, where steps are recorded; nothing may run meanwhile."""
        if not self._records_steps:
            return {}
        for process, route in zip(self._processes, self.routes(cell), strict=True):
            process.tell(TakeSteps(lora_ranks=adapter_ranks(workload, route.base_model_id)))
        return {ReplicaId(process.name): process.answer(Samples) for process in self._processes}

    def check(self) -> None:
        """LoraplexError when one has ended."""
        for process in self._processes:
            process.check()

    def close(self) -> None:
        for process in self._processes:
            process.end()
        for process in self._processes:
            process.wait()
        self._folder.cleanup()

    def _start_all(self, cell: Cell) -> None:
        """All processes at once; bases that share several devices load one after the other: while they capture their
        graphs, sums of one would wait on one device for what another computes on the next."""
        groups = cell.plan.groups
        first = list(accumulate((group.shape.num_ranks for group in groups), initial=0))
        places = [(index, turn) for index, group in enumerate(groups) for turn in range(len(group.bases))]
        by_place: dict[tuple[int, int], _Process] = {}
        for index, turn in places:
            by_place[index, turn] = _Process(f"{groups[index].name}/{groups[index].bases[turn].base_model_id}")
            self._processes.append(by_place[index, turn])
        for index, turn in sorted(places, key=lambda place: place[1]):
            group = groups[index]
            if group.shape.num_ranks > 1 and turn > 0:
                by_place[index, turn - 1].wait_ready()
            start = self._start(group, group.bases[turn], cell.pages[index][turn], first[index])
            by_place[index, turn].tell(start)
        for process in self._processes:
            process.wait_ready()

    def _start(self, group: GroupPlan, placed: BasePlacement, pages: int, first: int) -> ReplicaStart:
        experiment = self._experiment
        base = next(base for base in experiment.bases if base.name == placed.base_model_id)
        return ReplicaStart(
            replica_id=f"{group.name}/{base.name}",
            base=base.name,
            model=base.model,
            executor=executor_config(experiment, group, base, pages=pages, first_device=first),
            engine=experiment.replica_engine,
            secret=self.secret,
            turns=str(Path(self._folder.name) / group.name) if len(group.bases) > 1 else None,
            num_replicas=len(group.bases),
            records_steps=self._records_steps,
        )


def adapter_ranks(workload: Workload, base: str) -> list[int]:
    """LoRA ranks of the base's adapters, in the order of the workload."""
    return [rank for _, of, _, rank in workload.adapters if of == base]


class _Process:
    """It imports what it needs, and waits to be told what to load."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ready: ReplicaReady | None = None
        command: Sequence[str] = (sys.executable, "-m", "loraplex.bench.fleet.replica")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def ready(self) -> ReplicaReady:
        assert self._ready is not None, "nobody has waited for it"
        return self._ready

    def wait_ready(self) -> None:
        """Idempotent. BadConfig when it could not start."""
        if self._ready is None:
            self._ready = self.answer(ReplicaReady)
        if self._ready.error is not None:
            raise BadConfig(f"{self.name}: {self._ready.error}")

    def tell(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self, type_: type[_T]) -> _T:
        """Blocks. LoraplexError when the process ends."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return msgspec.json.decode(line, type=type_)

    def check(self) -> None:
        if self._process.poll() is not None:
            raise self._ended()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> None:
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ended(self) -> LoraplexError:
        return LoraplexError(f"replica {self.name} ended: exit code {self._process.wait()}")
