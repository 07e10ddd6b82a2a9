"""``core.step.Executor`` over a group of ranks: what the engine decides once goes to all of them in one message a step.

Knows shapes and messages, no tensors. What could fail on one rank and not on another is checked here first, so that a
rank that raises means a lost group. Driven by the engine loop of a replica, from one thread; ``stage_adapter`` and
``unstage_adapter`` from any.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from loraplex.core.adapter import AdapterManifest
from loraplex.core.errors import Conflict, error_from_code
from loraplex.core.ids import Digest
from loraplex.core.model import ModelSpec
from loraplex.core.step import ArenaSpec, SampledToken, StepPlan, StepResult
from loraplex.model_runner.adapter_layout import plan_shard_layout
from loraplex.model_runner.config import ExecutorConfig
from loraplex.model_runner.executor_base import ExecutorBase
from loraplex.model_runner.rank_executor import check_step_size
from loraplex.model_runner.ranks.group import RankGroup
from loraplex.model_runner.ranks.launcher import RankLauncher
from loraplex.model_runner.ranks.messages import (
    Ahead,
    Begin,
    Drop,
    Load,
    RankJob,
    Stage,
    Staged,
    Step,
    StepDone,
    Unstage,
)
from loraplex.model_runner.ranks.step_codec import StepEncoder
from loraplex.model_runner.shard import Shard

_done = msgspec.msgpack.Decoder(StepDone)
_WAIT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    step_id: int
    slots: tuple[int, ...]
    """Of the rows that sample."""
    submitted_s: float


class _Staging:
    """One adapter on its way into the host memory of all ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._missing = num_ranks
        self.failure: Staged | None = None
        self.ended = threading.Event()

    def take(self, answer: Staged) -> None:
        self._missing -= 1
        if answer.code and self.failure is None:
            self.failure = answer
        if self._missing == 0:
            self.ended.set()


class GroupExecutor(ExecutorBase):
    def __init__(
        self,
        config: ExecutorConfig,
        shards: Sequence[Shard],
        *,
        model: str,
        itemsize: int,
        launcher: RankLauncher,
    ) -> None:
        """Starts the ranks and loads ``model`` on them. ``config``: with ``stage_layers``, ``num_threads``
        and ``page_size`` filled in. ``itemsize``: bytes of an element of KV and adapters. BadConfig, ExecutorLost."""
        assert config.page_size is not None, "one for all ranks"
        self._config = config
        self._model = shards[0].model
        self._stages = [shard for shard in shards if shard.tp_rank == 0]
        self._page_bytes = [config.page_size * shard.local.kv_elements_per_token * itemsize for shard in self._stages]
        self._itemsize = itemsize
        self._num_ranks = len(shards)
        self._stagings: dict[int, _Staging] = {}
        self._staging_ids = itertools.count(1)
        self._staged: dict[Digest, int] = {}
        """Pages that each takes on the rank that needs most."""
        self._loaded: dict[Digest, int] = {}
        self._numbers = itertools.count()
        self._encoder = StepEncoder()
        self.prepares = config.device != "cpu"
        """Steps reach the ranks ahead of their turn; on a CPU they only disturb who computes."""
        self._ahead: int | None = None
        """The step that the ranks have and may not run yet."""
        # GPUs are given their next step while they compute, and hand tokens back without the host.
        self._max_in_flight = len(self._stages) + (config.device != "cpu")
        self._in_flight: deque[_InFlight] = deque()
        self._collected_s = 0.0
        self._group = RankGroup(
            launcher,
            self._num_ranks,
            speaker=self._stages[-1].rank,
            timeout_s=config.rank_timeout_s,
            on_staged=self._on_staged,
        )
        base_model_id = self._model.base_model_id
        num_pages = self._group.load(
            lambda port: RankJob(config=config, model=model, base_model_id=base_model_id, store_port=port)
        )
        self._arena = ArenaSpec(num_pages=num_pages, page_size=config.page_size, page_bytes=max(self._page_bytes))

    @property
    def model(self) -> ModelSpec:
        return self._model

    @property
    def arena(self) -> ArenaSpec:
        return self._arena

    @property
    def itemsize(self) -> int:
        return self._itemsize

    @property
    def max_in_flight(self) -> int:
        return self._max_in_flight

    @property
    def num_stages(self) -> int:
        return len(self._stages)

    def check(self) -> None:
        self._group.check()

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        """Of the rank that needs most. Pure. BadAdapter when it does not fit the base."""
        return max(
            plan_shard_layout(manifest.blocks, shard, page_bytes=page_bytes, itemsize=self._itemsize).num_pages
            for shard, page_bytes in zip(self._stages, self._page_bytes, strict=True)
        )

    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        """Each rank reads its part of the file, which must lie at ``path`` on its machine. BadAdapter, NotFound,
        ExecutorLost."""
        self._stage(manifest, path, 0)

    def stage_random_adapter(self, manifest: AdapterManifest, seed: int) -> None:
        self._stage(manifest, None, seed)

    def unstage_adapter(self, digest: Digest) -> None:
        self._staged.pop(digest, None)
        self._group.send(Unstage(digest))

    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
        """Each rank copies its part into the first of ``pages``. Conflict when it is not staged, or loaded already."""
        num_pages = self._staged.get(digest)
        if num_pages is None:
            raise Conflict(f"adapter {digest} is not staged")
        if digest in self._loaded:
            raise Conflict(f"adapter {digest} is already loaded")
        if len(pages) != num_pages:
            raise Conflict(f"adapter {digest} takes {num_pages} pages, {len(pages)} were given")
        number = next(self._numbers)
        self._group.send(Load(digest, number, pages))
        self._loaded[digest] = number

    def drop_adapter(self, digest: Digest) -> None:
        """Idempotent."""
        number = self._loaded.pop(digest, None)
        if number is not None:
            self._group.send(Drop(digest, number))

    def prepare(self, plan: StepPlan) -> None:
        """Raises as ``submit``."""
        if not self.prepares:
            return
        self._group.send(Ahead(self._encode(plan)))
        self._ahead = plan.step_id

    def submit(self, plan: StepPlan) -> None:
        """Conflict when the step is too large, names an adapter that is not loaded, or ``max_in_flight`` are in flight.
        ExecutorLost."""
        message: Step | Begin
        if self._ahead is None:
            message = self._encode(plan)
        else:
            assert self._ahead == plan.step_id, "the ranks have prepared another step"
            message, self._ahead = Begin(), None
        submitted_s = time.perf_counter()
        if not self._in_flight:
            self._group.busy(time.monotonic())
        self._group.send(message)
        # The ranks are at work from here on.
        slots = tuple([row.slot for row in plan.rows if row.samples])
        self._in_flight.append(_InFlight(step_id=plan.step_id, slots=slots, submitted_s=submitted_s))

    def collect(self) -> StepResult:
        """Waits for the last stage. Conflict when no step is in flight. ExecutorLost."""
        if not self._in_flight:
            raise Conflict("no step is in flight")
        done = _done.decode(self._group.receive())
        step = self._in_flight.popleft()
        assert done.step_id == step.step_id, "a rank answered another step"
        if not self._in_flight:
            self._group.busy(None)
        tokens = done.detailed or tuple(
            SampledToken(slot=slot, token_id=token_id)
            for slot, token_id in zip(step.slots, done.token_ids, strict=True)
        )
        # A step that was submitted while its predecessor ran began when that ended.
        began_s, self._collected_s = max(step.submitted_s, self._collected_s), time.perf_counter()
        return StepResult(step_id=step.step_id, tokens=tokens, duration_s=self._collected_s - began_s)

    def close(self) -> None:
        """Ends the ranks. Idempotent."""
        self._group.close()

    def _encode(self, plan: StepPlan) -> Step:
        self.check()
        if len(self._in_flight) >= self.max_in_flight:
            raise Conflict(f"{self.max_in_flight} steps are in flight already")
        check_step_size(plan, max_rows=self._config.max_rows, max_step_tokens=self._config.max_step_tokens)
        return self._encoder.encode(plan, self._loaded)

    def _stage(self, manifest: AdapterManifest, path: str | None, seed: int) -> None:
        if manifest.digest in self._staged:
            return
        # What does not fit the base is refused before anybody reads a file.
        num_pages = self.adapter_pages(manifest)
        request, staging = next(self._staging_ids), _Staging(self._num_ranks)
        self._stagings[request] = staging
        try:
            self._group.send(Stage(request, manifest, path, seed))
            while not staging.ended.wait(_WAIT_S):
                self._group.check()
        finally:
            del self._stagings[request]
        if staging.failure is not None:
            self._group.send(Unstage(manifest.digest))
            raise error_from_code(staging.failure.code, staging.failure.message)
        self._staged[manifest.digest] = num_pages

    def _on_staged(self, answer: Staged) -> None:
        staging = self._stagings.get(answer.request)
        if staging is not None:
            staging.take(answer)
