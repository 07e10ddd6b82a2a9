"""The exact simulator against replicas as they run: engine, driver and turns, on executors that keep the costs' time,
on a virtual clock."""

import dataclasses
from typing import cast

import numpy as np
import pytest
from loraplex.core.adapter import AdapterBlock, AdapterManifest, AdapterRef
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.model import LORA_MODULES
from loraplex.core.plan import Shape
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.core.step import Executor
from loraplex.engine import Engine, EngineConfig
from loraplex.model_runner.turns.executor import TurnExecutor
from loraplex.model_runner.turns.queue import TurnQueue
from loraplex.replica.driver import StepDriver
from loraplex.simulator.cluster import Cluster, Replica
from loraplex.simulator.exact import simulate_exact
from loraplex.simulator.scenarios import SMALL, make_arrivals, make_input
from loraplex.simulator.types import FloatArray, SimulationInput
from loraplex.simulator.workload import Workload
from loraplex.testing.paced_executor import PacedExecutor

from tests.simulator.virtual_time import VirtualTime, VirtualTurnQueue, VirtualTurns

OTHER = BaseModelId("another-8b")
_START_S = 10.0
"""Before that adapters are staged."""


def bursts(
    *, shape: Shape, shares: tuple[float, ...], rate: float, cv: float = 3.0, seed: int = 0, num_requests: int = 400
) -> SimulationInput:
    """One group with as many bases as there are ``shares`` of the requests; one tenant, no two requests at once."""
    bases = (SMALL, OTHER, BaseModelId("third-8b"))[: len(shares)]
    arrivals = make_arrivals(
        num_requests=num_requests,
        rate=rate,
        cv=cv,
        num_adapters=6 * len(bases),
        num_tenants=1,
        bases=bases,
        output=64,
        seed=seed,
    )
    # Adapter i belongs to base i mod the number of bases.
    random = np.random.default_rng(seed)
    base = random.choice(len(bases), size=num_requests, p=shares)
    adapter = (arrivals.adapter // len(bases) * len(bases) + base).astype(np.int32)
    arrivals = dataclasses.replace(
        arrivals,
        arrival_s=arrivals.arrival_s + _START_S + 1e-6 * np.arange(num_requests),
        adapter=adapter,
        base_model=base.astype(np.int32),
        tenant=np.zeros(num_requests, dtype=np.int32),
    )
    engine = EngineConfig(max_running=64, max_waiting=1000, max_step_tokens=2048)
    return make_input(arrivals, num_groups=1, shape=shape, bases=bases, engine=engine)


def served(given: SimulationInput) -> tuple[FloatArray, FloatArray]:
    """TTFT and TPOT of each request, of replicas that take turns on one group."""
    workload = Workload.of(given.arrivals, given.adapters)
    cluster = Cluster.of(given, workload)
    count = len(workload)
    first_s, end_s = np.full(count, np.inf), np.full(count, np.inf)
    time = VirtualTime()
    turns = VirtualTurns(time, given.turn_s)
    for replica in cluster.replicas:
        rows = np.flatnonzero(given.arrivals.base_model == replica.base)
        own = _Replica(given, workload, replica, rows, time, turns, alone=len(cluster.replicas) == 1)
        time.start(lambda own=own: own.serve(first_s, end_s))  # type: ignore[misc]
    time.run()
    arrivals = given.arrivals
    tpot_s = (end_s - first_s) / np.maximum(arrivals.output_tokens - 1, 1)
    return first_s - arrivals.arrival_s, tpot_s


class _Replica:
    def __init__(
        self,
        given: SimulationInput,
        workload: Workload,
        replica: Replica,
        rows: np.ndarray[tuple[int], np.dtype[np.intp]],
        time: VirtualTime,
        turns: VirtualTurns,
        *,
        alone: bool,
    ) -> None:
        self._given, self._time = given, time
        self._rows = rows
        self._keys = workload.adapter_keys
        self._paced = PacedExecutor(
            replica.cost,
            replica.shape,
            model=replica.cost.model,
            num_pages=replica.num_pages,
            clock=time,
            sleep=time.sleep,
        )
        queue = cast(TurnQueue, VirtualTurnQueue(turns))
        executor: Executor = self._paced if alone else TurnExecutor(self._paced, queue)
        model = replica.cost.model
        self._base = replica.base
        self._engine = Engine(given.engine, model=model, arena=executor.arena, num_stages=executor.num_stages)
        self._driver = StepDriver(self._engine, executor, clock=time, unstage=executor.unstage_adapter, hear=self._hear)
        self._at_s, self._num_heard = given.arrivals.arrival_s[rows], 0

    def serve(self, first_s: FloatArray, end_s: FloatArray) -> None:
        """All its requests, as ``replica.engine_loop`` does."""
        self._stage_all()
        while True:
            self._hear()
            outcome = self._driver.step()
            now_s = self._time.monotonic_s()
            for output in outcome.outputs:
                row = int(output.request_id)
                first_s[row] = min(first_s[row], now_s)
                if output.finish_reason is not None:
                    assert output.error is None
                    end_s[row] = now_s
            if not outcome.progressed:
                if self._num_heard == len(self._rows):
                    return
                self._time.sleep(self._at_s[self._num_heard] - now_s)

    def _hear(self) -> None:
        while self._num_heard < len(self._rows) and self._at_s[self._num_heard] <= self._time.monotonic_s():
            self._engine.add(self._request(int(self._rows[self._num_heard])), self._time.monotonic_s())
            self._num_heard += 1

    def _stage_all(self) -> None:
        for index in np.unique(self._given.arrivals.adapter[self._rows]):
            rank = self._given.adapters[index].lora_rank
            blocks = tuple(AdapterBlock(layer=0, module=m, lora_rank=rank, scale=1.0) for m in LORA_MODULES)
            manifest = AdapterManifest(
                digest=Digest(self._keys[index]),
                base_model_id=self._paced.model.base_model_id,
                blocks=blocks,
                num_bytes=1,
            )
            self._paced.stage_adapter(manifest, __file__)
            self._engine.adapter_staged(manifest.digest, self._paced.adapter_pages(manifest), 0.0)
        assert self._time.monotonic_s() < _START_S

    def _request(self, row: int) -> EngineRequest:
        arrivals = self._given.arrivals
        adapter, tenant = int(arrivals.adapter[row]), TenantName(arrivals.tenants[arrivals.tenant[row]])
        name = arrivals.adapters[adapter].name
        return EngineRequest(
            request_id=RequestId(str(row)),
            tenant=tenant,
            base_model_id=BaseModelId(arrivals.base_models[self._base]),
            adapter=AdapterRef(tenant=tenant, name=name, version=1, digest=Digest(self._keys[adapter])),
            prompt_token_ids=(1,) * int(arrivals.prompt_tokens[row]),
            sampling=SamplingParams(max_tokens=int(arrivals.output_tokens[row]), seed=0, ignore_eos=True),
            arrival_s=float(arrivals.arrival_s[row]),
            cache_salt=str(row),
        )


@pytest.mark.parametrize(
    ("shape", "shares", "rate", "turn_s"),
    [
        pytest.param(Shape(), (1.0,), 12.0, 0.0, id="alone"),
        pytest.param(Shape(), (0.2, 0.8), 12.0, 1e-3, id="two bases"),
        pytest.param(Shape(tp=2), (0.1, 0.4, 0.5), 20.0, 1e-3, id="three bases"),
        pytest.param(Shape(pp=2), (1.0,), 20.0, 0.0, id="pipeline"),
        pytest.param(Shape(pp=2), (0.2, 0.8), 20.0, 0.0, id="two bases in a pipeline"),
        pytest.param(Shape(pp=4), (1.0,), 20.0, 0.0, id="four stages"),
    ],
)
def test_requests_take_as_long_as_on_replicas_that_run(
    shape: Shape, shares: tuple[float, ...], rate: float, turn_s: float
) -> None:
    given = dataclasses.replace(bursts(shape=shape, shares=shares, rate=rate), turn_s=turn_s)
    ttft_s, tpot_s = served(given)
    predicted = simulate_exact(given)
    assert np.isfinite(predicted.ttft_s).all()
    assert np.allclose(predicted.ttft_s, ttft_s, rtol=1e-9)
    assert np.allclose(predicted.tpot_s, tpot_s, rtol=1e-9)
