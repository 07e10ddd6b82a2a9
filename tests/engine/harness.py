"""An engine and the fake executor, which checks every plan, stepped by hand."""

import pytest
from loraplex.core.adapter import AdapterRef
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, Priority, RequestOutput, SamplingParams
from loraplex.core.step import StepPlan
from loraplex.engine import Engine, EngineConfig
from loraplex.engine.instructions import Instructions
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens, fake_manifest, fake_model
from loraplex.testing.steps import run_step

A, B = Digest("a" * 64), Digest("b" * 64)


class Harness:
    """An engine and an executor, stepped by hand; one step takes one second."""

    def __init__(self, *, num_pages: int = 64, page_size: int = 4, **config: float) -> None:
        self.executor = FakeExecutor(model=fake_model(max_context_tokens=256), num_pages=num_pages, page_size=page_size)
        settings = {"max_running": 8, "max_step_tokens": 64, **config}
        self.engine = Engine(
            EngineConfig(**settings),  # type: ignore[arg-type]
            model=self.executor.model,
            arena=self.executor.arena,
        )
        self.now_s = 0.0
        self.tokens: dict[str, list[int]] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.plans: list[StepPlan] = []
        self.loads: list[tuple[Digest, ...]] = []
        """By calls of ``schedule``."""
        self.drops: list[Digest] = []

    def stage(self, digest: Digest, *, lora_rank: int = 8) -> None:
        manifest = fake_manifest(digest, lora_rank=lora_rank)
        self.executor.stage_adapter(manifest, "")
        self.take(self.engine.adapter_staged(digest, self.executor.adapter_pages(manifest), self.now_s))

    def schedule(self) -> Instructions:
        """What the engine wants done with adapters is done."""
        instructions = self.engine.schedule(self.now_s)
        for digest in instructions.drops:
            self.executor.drop_adapter(digest)
        for digest in instructions.unstages:
            self.executor.unstage_adapter(digest)
        for load in instructions.loads:
            self.executor.load_adapter(load.digest, load.pages)
        self.drops.extend(instructions.drops)
        self.loads.append(tuple(load.digest for load in instructions.loads))
        self.engine.validate()
        return instructions

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.now_s += 1.0
            plan = self.schedule().plan
            if plan is not None:
                self.plans.append(plan)
                self.take(self.engine.complete(run_step(self.executor, plan), self.now_s))
                self.engine.validate()

    def add(self, request: EngineRequest) -> EngineRequest:
        self.engine.add(request, self.now_s)
        return request

    def run(self, limit: int = 500) -> None:
        for _ in range(limit):
            if self.engine.num_unfinished == 0:
                return
            self.step()
        pytest.fail("requests are left")

    def check(self, *requests: EngineRequest) -> None:
        for request in requests:
            expected = expected_tokens(request, request.sampling.max_tokens)
            assert tuple(self.tokens[request.request_id]) == expected

    def running_rows(self) -> int:
        return len(self.plans[-1].rows)

    def take(self, outputs: tuple[RequestOutput, ...]) -> None:
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
            self.outputs.setdefault(output.request_id, []).append(output)


def make(
    name: str,
    *,
    prompt: tuple[int, ...] | int = 8,
    max_tokens: int = 4,
    tenant: str = "t",
    weight: float = 1.0,
    adapter: Digest | None = None,
    salt: str | None = None,
    stop: tuple[int, ...] = (),
    offline: bool = False,
    arrival_s: float = 0.0,
) -> EngineRequest:
    ref = None
    if adapter is not None:
        ref = AdapterRef(tenant=TenantName(tenant), name="a", version=1, digest=adapter)
    return EngineRequest(
        request_id=RequestId(name),
        tenant=TenantName(tenant),
        base_model_id=BaseModelId("fake-base"),
        adapter=ref,
        prompt_token_ids=tuple(range(prompt)) if isinstance(prompt, int) else prompt,
        sampling=SamplingParams(max_tokens=max_tokens, seed=0, stop_token_ids=stop),
        arrival_s=arrival_s,
        cache_salt=tenant if salt is None else salt,
        priority=Priority.OFFLINE if offline else Priority.ONLINE,
        weight=weight,
    )
