"""An Executor that computes nothing and takes the time that a cost profile says: serving at scale on a small machine.

Steps follow each other as on a device, through its stages if it has several, one more in flight than stages; a step
begins when there is room for it and its adapters are there, adapters come one after another over the host link. Waiting
is sleeping: the CPU's part is the engine's own.
Tokens are a hash of all that came before them, so that a request that resumes elsewhere goes on with the same ones.
Used by tests and by benchmarks of the platform, whose results name it.
"""

import hashlib
import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from loraplex.core.adapter import AdapterManifest
from loraplex.core.clock import Clock, SystemClock
from loraplex.core.errors import BadConfig, Conflict, NotFound
from loraplex.core.ids import BaseModelId, Digest
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.core.request import SamplingParams, TokenLogprob
from loraplex.core.step import ArenaSpec, Row, SampledToken, StepPlan, StepResult
from loraplex.cost.memory import PAGE_TOKENS, whole_adapter_bytes
from loraplex.cost.profile import CostProfile
from loraplex.engine import EngineConfig
from loraplex.simulator.plan_time import PlanTime
from loraplex.simulator.stages import StageLine
from loraplex.simulator.types import CostKey, ReplicaCost
from loraplex.testing.paced_config import PacedConfig


def paced_cost(config: PacedConfig, engine: EngineConfig, base_model_id: BaseModelId) -> ReplicaCost:
    """What the executor of ``config`` costs, for a simulation of it in which the base has this id.

    BadConfig naming what the profile does not know.
    """
    profile = CostProfile.load(config.profile).slowed(config.factor).renamed(config.base, base_model_id)
    gpus = [gpu.name for gpu in profile.gpus]
    if config.gpu is None and len(gpus) != 1:
        raise BadConfig(f"profile {config.profile} has several GPUs ({', '.join(gpus)}): name one", param="gpu")
    shape = Shape(tp=config.tp, pp=config.pp)
    key = CostKey(gpu=config.gpu or gpus[0], base_model_id=base_model_id, shape=shape)
    return ReplicaCost.of(profile, key, engine)


def build_paced_executor(
    config: PacedConfig, *, model: ModelSpec, engine: EngineConfig, num_pages: int | None = None
) -> "PacedExecutor":
    """``model``: what clients see. ``num_pages``: of the arena; None: what the profile's GPU has room for.

    BadConfig naming what the profile does not know, or the base that does not fit.
    """
    cost = paced_cost(config, engine, model.base_model_id)
    if num_pages is None:
        num_pages = cost.memory.num_pages
        if num_pages < 1:
            raise BadConfig(f"{config.base} does not fit on {config.tp} x {config.pp} GPUs of {config.profile}")
    return PacedExecutor(cost, Shape(tp=config.tp, pp=config.pp), model=model, num_pages=num_pages)


class PacedExecutor:
    """Implements ``core.step.Executor``. Of the sampling options it knows the seed, greedy and the log-probabilities of
    a certainty; it draws no end of sequence."""

    def __init__(
        self,
        cost: ReplicaCost,
        shape: Shape,
        *,
        model: ModelSpec,
        num_pages: int,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``sleep`` lets seconds of ``clock`` pass, by default those of the system."""
        self._model = model
        self._cost = cost
        self._clock, self._sleep = clock or SystemClock(), sleep
        self._time = PlanTime(cost.step, shape)
        self._num_stages = shape.pp
        self._line = StageLine(shape.pp)
        self._num_gpus = shape.num_ranks
        self._arena = ArenaSpec(num_pages=num_pages, page_size=PAGE_TOKENS, page_bytes=cost.memory.page_bytes)
        self._staged: dict[Digest, AdapterManifest] = {}
        self._loaded: dict[Digest, tuple[float, float]] = {}
        """Digest -> (bytes of the whole adapter, when it is there)."""
        self._link_free_s = 0.0
        self._slots: dict[int, _Text] = {}
        self._in_flight: deque[tuple[StepResult, float]] = deque()
        """Results, and when they are due."""

    @property
    def model(self) -> ModelSpec:
        return self._model

    @property
    def arena(self) -> ArenaSpec:
        return self._arena

    @property
    def max_in_flight(self) -> int:
        return self._num_stages + 1

    @property
    def num_stages(self) -> int:
        return self._num_stages

    def check(self) -> None:
        """There is no process to lose."""

    def adapter_pages(self, manifest: AdapterManifest) -> int:
        """As for an adapter of these ranks on these modules in every layer of the profile's base."""
        return -(-self._bytes_per_gpu(manifest) // self._arena.page_bytes)

    def stage_adapter(self, manifest: AdapterManifest, path: str) -> None:
        """Waits as long as disk and packing take in the profile. NotFound when the file is gone."""
        if not Path(path).is_file():
            raise NotFound(f"no adapter file {path}")
        self._sleep(self._cost.loads.disk.seconds(self._whole_bytes(manifest)))
        self._staged[manifest.digest] = manifest

    def unstage_adapter(self, digest: Digest) -> None:
        self._staged.pop(digest, None)

    def load_adapter(self, digest: Digest, pages: tuple[int, ...]) -> None:
        """Takes its turn on the host link; no bytes are moved. Conflict when it is not staged."""
        manifest = self._staged.get(digest)
        if manifest is None:
            raise Conflict(f"adapter {digest} is not staged")
        begin_s = max(self._link_free_s, self._clock.monotonic_s())
        self._link_free_s = begin_s + self._cost.loads.host.seconds(self._bytes_per_gpu(manifest))
        self._loaded[digest] = (self._whole_bytes(manifest), self._link_free_s)

    def drop_adapter(self, digest: Digest) -> None:
        del self._loaded[digest]

    def prepare(self, plan: StepPlan) -> None:
        """``submit`` does everything."""

    def submit(self, plan: StepPlan) -> None:
        """Conflict when as many steps are in flight as may be."""
        if len(self._in_flight) == self.max_in_flight:
            raise Conflict(f"step {plan.step_id}: {self.max_in_flight} steps are in flight")
        for slot in plan.releases:
            self._slots.pop(slot, None)
        for start in plan.starts:
            self._slots[start.slot] = _Text(start.sampling, start.token_ids, self._model)
        tokens = tuple(self._slots[row.slot].draw(row) for row in plan.rows if row.samples)
        at_s, latency_s, interval_s = self._clock.monotonic_s(), 0.0, 0.0
        if plan.rows:
            digests = {row.adapter for row in plan.rows if row.adapter is not None}
            adapters = [self._loaded[digest] for digest in digests]
            at_s = max([at_s, *(there_s for _, there_s in adapters)])
            whole_bytes = sum(num_bytes for num_bytes, _ in adapters)
            latency_s, interval_s = self._time.seconds(plan, num_adapters=len(adapters), adapter_bytes=whole_bytes)
        span = self._line.enter(at_s, latency_s=latency_s, interval_s=interval_s)
        result = StepResult(step_id=plan.step_id, tokens=tokens, duration_s=span.busy_s)
        self._in_flight.append((result, span.end_s))

    def collect(self) -> StepResult:
        """Sleeps until the oldest step is due. Conflict when there is none."""
        if not self._in_flight:
            raise Conflict("no step is in flight")
        result, due_s = self._in_flight.popleft()
        self._sleep(max(0.0, due_s - self._clock.monotonic_s()))
        return result

    def close(self) -> None:
        self._in_flight.clear()
        self._slots.clear()

    def _whole_bytes(self, manifest: AdapterManifest) -> float:
        cost = self._cost
        return float(
            sum(
                whole_adapter_bytes(cost.model, rank, (module,), itemsize=cost.itemsize)
                for module, rank in _ranks(manifest)
            )
        )

    def _bytes_per_gpu(self, manifest: AdapterManifest) -> int:
        return sum(self._cost.memory.adapter_bytes(rank, (module,)) for module, rank in _ranks(manifest))


def _ranks(manifest: AdapterManifest) -> Iterable[tuple[str, int]]:
    """The largest rank of each module."""
    ranks: dict[str, int] = {}
    for block in manifest.blocks:
        ranks[block.module] = max(ranks.get(block.module, 0), block.lora_rank)
    return ranks.items()


class _Text:
    """All tokens of one slot, as a running hash. The next token is a number of it, from the last quarter of the
    vocabulary: in byte-pair vocabularies whole words, so that each token is text at once."""

    def __init__(self, sampling: SamplingParams, token_ids: tuple[int, ...], model: ModelSpec) -> None:
        seed = sampling.seed if sampling.temperature > 0 else 0
        self._num_logprobs = sampling.num_logprobs
        self._hash = hashlib.blake2b(array("q", (seed, *token_ids)).tobytes(), digest_size=8)
        self._first = model.vocab_size - model.vocab_size // 4
        self._size = model.vocab_size - self._first
        self._ends = frozenset(model.eos_token_ids)

    def draw(self, row: Row) -> SampledToken:
        number = int.from_bytes(self._hash.digest(), "little")
        if row.adapter is not None:
            number ^= zlib.crc32(row.adapter.encode())
        token_id = self._first + number % self._size
        while token_id in self._ends:
            token_id = self._first + (token_id + 1 - self._first) % self._size
        self._hash.update(array("q", (token_id,)).tobytes())
        if self._num_logprobs is None:
            return SampledToken(slot=row.slot, token_id=token_id)
        top = (TokenLogprob(token_id=token_id, logprob=0.0),) if self._num_logprobs > 0 else ()
        return SampledToken(slot=row.slot, token_id=token_id, logprob=0.0, top_logprobs=top)
