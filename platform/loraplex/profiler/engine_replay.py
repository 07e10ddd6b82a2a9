"""Arrivals in real time through a running replica: the real engine loop, without a network.

Owns the thread that sends and the times at which tokens came. Called by ``simulated``.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from loraplex.bench.recorder import RecordingEngine
from loraplex.bench.staging import write_random_adapter
from loraplex.core.adapter import AdapterManifest, AdapterRef
from loraplex.core.errors import LoraplexError
from loraplex.core.ids import BaseModelId, Digest, ReplicaId, RequestId, TenantName
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape
from loraplex.core.request import EngineRequest, FinishReason, SamplingParams
from loraplex.core.step import Executor
from loraplex.core.wire import ReplicaFrame
from loraplex.cost.ceilings import FloatArray
from loraplex.cost.samples import Samples
from loraplex.engine import EngineConfig
from loraplex.loadgen.outcomes import Outcomes
from loraplex.replica.engine_loop import EngineLoop
from loraplex.traces.arrivals import Arrivals

_SESSION = 1
_LONGEST_SILENCE_S = 120.0
_HEAD_START_S = 0.2
_HAND_OVERS = 9


class AdapterFiles:
    """An ``ArtifactSource`` of made-up adapters, one file for all: only their sizes count."""

    def __init__(self, manifests: tuple[AdapterManifest, ...], model: ModelSpec) -> None:
        """All manifests have the same blocks."""
        self.manifests = manifests
        self._by_digest = {manifest.digest: manifest for manifest in manifests}
        self._folder = tempfile.TemporaryDirectory(prefix="loraplex-adapters-")
        self._path = Path(self._folder.name) / "adapter.safetensors"
        if manifests:
            write_random_adapter(manifests[0], model, self._path, torch.bfloat16)

    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        yield self._by_digest[digest], str(self._path)

    def close(self) -> None:
        self._folder.cleanup()


class EngineReplay:
    """One replica for any number of runs."""

    def __init__(self, executor: Executor, engine: EngineConfig, files: AdapterFiles, *, itemsize: int = 4) -> None:
        """Owns ``executor`` and ``files``. ``itemsize``: bytes of an element of the executor's KV and adapters."""
        self._model = executor.model
        self._files = files
        self._recording = RecordingEngine(engine, executor, itemsize=itemsize, shape=Shape())
        self._arrived = threading.Condition()
        self._run: _Times | None = None
        self._start_s = 0.0
        self._loop = EngineLoop(
            replica_id=ReplicaId("replica"),
            executor=executor,
            engine_config=engine,
            source=files,
            engine=self._recording,
        )
        self._loop.connect(self._deliver, on_end=lambda: None)
        self._loop.start()
        self._loop.open_session(_SESSION)

    def run(self, arrivals: Arrivals, digests: Mapping[int, Digest], *, seed: int) -> Outcomes:
        """Sends every request at its time and waits for all. ``digests``: of the adapters by their index.

        Raises LoraplexError when a request fails, or nothing comes any more.
        """
        requests = [self._request(arrivals, digests, row, seed) for row in range(len(arrivals))]
        times = self._run = _Times(len(requests))
        self._recording.clear()
        start_s = self._start_s = time.perf_counter() + _HEAD_START_S
        for request, at_s in zip(requests, arrivals.arrival_s.tolist(), strict=True):
            time.sleep(max(0.0, start_s + at_s - time.perf_counter()))
            self._loop.submit(_SESSION, (request,))
        with self._arrived:
            while times.num_unfinished:
                if not self._arrived.wait(_LONGEST_SILENCE_S):
                    raise LoraplexError(f"nothing came for {_LONGEST_SILENCE_S:.0f} s")
                if times.error is not None:
                    raise LoraplexError(times.error)
        first_s, last_s = times.first_s - start_s, times.last_s - start_s
        return Outcomes(
            at_s=arrivals.arrival_s,
            tenants=arrivals.tenants,
            tenant=arrivals.tenant,
            ttft_s=first_s - arrivals.arrival_s,
            tpot_s=(last_s - first_s) / np.maximum(arrivals.output_tokens - 1, 1),
        )

    def steps(self) -> Samples:
        """Of the last run."""
        return Samples.of(self._recording.composition(self._files.manifests), self._recording.step_seconds())

    def step_starts(self) -> FloatArray:
        """(S,) seconds after the start of the last run."""
        return self._recording.step_starts() - self._start_s

    def hand_over_s(self, lone: Arrivals) -> float:
        """What the first token of a request waits for beside its step: until the engine's thread has heard of the
        request, and until the token is with the caller. Median over runs of ``lone``, one short request."""
        found = []
        for seed in range(_HAND_OVERS):
            outcomes = self.run(lone, {}, seed=seed)
            found.append(float(outcomes.ttft_s[0] - self._recording.step_seconds()[0]))
        return statistics.median(found)

    def close(self) -> None:
        self._loop.stop()
        self._loop.join()
        self._files.close()

    def _deliver(self, frames: dict[int, ReplicaFrame]) -> None:
        now_s = time.perf_counter()
        frame = frames.get(_SESSION)
        if frame is None or not frame.outputs or self._run is None:
            return
        with self._arrived:
            for output in frame.outputs:
                row = int(output.request_id.rpartition("-")[2])
                self._run.take(row, now_s, output.finish_reason, output.error)
            self._arrived.notify()

    def _request(self, arrivals: Arrivals, digests: Mapping[int, Digest], row: int, seed: int) -> EngineRequest:
        random = np.random.default_rng((seed, row))
        prompt = random.integers(0, self._model.vocab_size, size=int(arrivals.prompt_tokens[row]))
        tenant = TenantName(arrivals.tenants[int(arrivals.tenant[row])])
        adapter = int(arrivals.adapter[row])
        ref = None
        if adapter >= 0:
            ref = AdapterRef(tenant=tenant, name=str(adapter), version=1, digest=digests[adapter])
        return EngineRequest(
            request_id=RequestId(f"{seed}-{row}"),
            tenant=tenant,
            base_model_id=BaseModelId(self._model.base_model_id),
            adapter=ref,
            prompt_token_ids=tuple(prompt.tolist()),
            sampling=SamplingParams(
                max_tokens=int(arrivals.output_tokens[row]), seed=0, temperature=0.0, ignore_eos=True
            ),
            arrival_s=0.0,
            cache_salt=f"{seed}-{row}",
        )


class _Times:
    """Seconds of ``time.perf_counter`` at which the tokens of each request came. Guarded by its owner."""

    def __init__(self, num_requests: int) -> None:
        self.first_s = np.full(num_requests, np.inf)
        self.last_s = np.full(num_requests, np.inf)
        self.num_unfinished = num_requests
        self.error: str | None = None

    def take(self, row: int, now_s: float, finish: FinishReason | None, error: str | None) -> None:
        if not np.isfinite(self.first_s[row]):
            self.first_s[row] = now_s
        self.last_s[row] = now_s
        self.num_unfinished -= finish is not None
        self.error = self.error or error
