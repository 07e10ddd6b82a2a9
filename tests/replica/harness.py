"""The engine's thread over a fake executor, and what it sends to its sessions."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.core.adapter import AdapterManifest, AdapterRef
from loraplex.core.ids import BaseModelId, Digest, ReplicaId, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, SamplingParams
from loraplex.core.step import Executor
from loraplex.core.wire import ReplicaFrame
from loraplex.engine import EngineConfig
from loraplex.replica.config import ReplicaConfig
from loraplex.replica.engine_loop import EngineLoop
from loraplex.testing.fake_executor import FakeExecutor, fake_manifest

A = "a" * 64


class Source:
    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}

    @contextmanager
    def open(self, digest: Digest) -> Iterator[tuple[AdapterManifest, str]]:
        if digest in self.errors:
            raise self.errors[digest]
        yield fake_manifest(digest), "path"


class Harness:
    def __init__(
        self, executor: FakeExecutor, engine: EngineConfig | None = None, *, driven: Executor | None = None
    ) -> None:
        """``driven``: what the loop drives, where that is not ``executor`` itself."""
        self.executor = executor
        self.source = Source()
        self.loop = EngineLoop(
            replica_id=ReplicaId("r"),
            executor=driven or executor,
            engine_config=engine or EngineConfig(),
            source=self.source,
            config=ReplicaConfig(load_report_interval_s=0.02),
        )
        self.frames: defaultdict[int, list[ReplicaFrame]] = defaultdict(list)
        self.arrived = threading.Condition()
        self.ended = threading.Event()
        self.loop.connect(self.deliver, on_end=self.ended.set)
        self.loop.start()

    def deliver(self, frames: dict[int, ReplicaFrame]) -> None:
        with self.arrived:
            for session, frame in frames.items():
                self.frames[session].append(frame)
            self.arrived.notify_all()

    def tokens(self, session: int, name: str) -> tuple[int, ...]:
        return tuple(
            t.token_id for f in self.frames[session] for o in f.outputs if o.request_id == name for t in o.tokens
        )

    def wait_end(self, session: int, *names: str) -> dict[str, FinishReason]:
        def reasons() -> dict[str, FinishReason]:
            outputs = [o for f in self.frames[session] for o in f.outputs]
            return {o.request_id: o.finish_reason for o in outputs if o.finish_reason is not None}

        with self.arrived:
            assert self.arrived.wait_for(lambda: set(names) <= set(reasons()), 10)
        return {name: reasons()[RequestId(name)] for name in names}


def make(
    name: str, *, max_tokens: int = 20, adapter: str | None = None, prompt: int = 6, tenant: str = "t"
) -> EngineRequest:
    ref = None
    if adapter is not None:
        ref = AdapterRef(tenant=TenantName(tenant), name="a", version=1, digest=Digest(adapter))
    return EngineRequest(
        request_id=RequestId(name),
        tenant=TenantName(tenant),
        base_model_id=BaseModelId("fake-base"),
        adapter=ref,
        prompt_token_ids=tuple(range(prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        arrival_s=0.0,
        cache_salt="t",
    )
