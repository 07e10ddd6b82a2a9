"""Adapters keep to their share of the arena, however much room there is."""

import pytest
from loraplex.core.adapter import AdapterRef
from loraplex.core.clock import SystemClock
from loraplex.core.errors import BadConfig, InvalidInput
from loraplex.core.ids import BaseModelId, Digest, RequestId, TenantName
from loraplex.core.request import EngineRequest, FinishReason, SamplingParams
from loraplex.engine import Engine, EngineConfig
from loraplex.replica.driver import StepDriver
from loraplex.testing.fake_executor import PAGE_BYTES, FakeExecutor, fake_manifest, fake_model


class World:
    def __init__(self, max_adapter_pages: int) -> None:
        self.executor = FakeExecutor(model=fake_model(max_context_tokens=256), num_pages=200)
        config = EngineConfig(max_adapter_bytes=max_adapter_pages * PAGE_BYTES, max_running=8, max_step_tokens=64)
        self.engine = Engine(config, model=self.executor.model, arena=self.executor.arena)
        self.driver = StepDriver(self.engine, self.executor, clock=SystemClock(), unstage=self.executor.unstage_adapter)
        self.most_resident = 0

    def stage(self, name: str, *, pages: int) -> Digest:
        manifest = fake_manifest(Digest(name), lora_rank=8 * pages)
        self.executor.stage_adapter(manifest, "")
        self.engine.adapter_staged(manifest.digest, self.executor.adapter_pages(manifest), 0.0)
        return manifest.digest

    def add(self, name: str, adapter: Digest) -> None:
        self.engine.add(
            EngineRequest(
                request_id=RequestId(name),
                tenant=TenantName("t"),
                base_model_id=BaseModelId(self.executor.model.base_model_id),
                adapter=AdapterRef(tenant=TenantName("t"), name=name, version=1, digest=adapter),
                prompt_token_ids=(1, 2, 3),
                sampling=SamplingParams(max_tokens=4, seed=0, ignore_eos=True),
                arrival_s=0.0,
                cache_salt="",
            ),
            0.0,
        )

    def run(self) -> dict[str, FinishReason]:
        ends = {}
        while self.engine.num_unfinished:
            outcome = self.driver.step()
            assert outcome.progressed
            self.engine.validate()
            self.most_resident = max(self.most_resident, len(self.executor.loaded))
            ends.update({o.request_id: o.finish_reason for o in outcome.outputs if o.finish_reason is not None})
        assert not self.executor.violations
        return ends


def test_adapters_take_turns_within_their_share() -> None:
    world = World(max_adapter_pages=6)
    for index in range(9):
        world.add(f"r{index}", world.stage(f"a{index}", pages=2))
    assert set(world.run().values()) == {FinishReason.LENGTH}
    assert world.most_resident == 3, "neither more than their share nor less than fits"


def test_idle_adapters_make_room_within_the_share() -> None:
    world = World(max_adapter_pages=5)
    small, large = world.stage("small", pages=2), world.stage("large", pages=4)
    for name, adapter in (("first", small), ("second", large), ("third", small)):
        world.add(name, adapter)
        assert world.run() == {name: FinishReason.LENGTH}
        assert world.engine.resident_adapters() == (adapter,)


def test_a_share_that_holds_no_page_is_refused() -> None:
    executor = FakeExecutor()
    with pytest.raises(BadConfig, match=str(PAGE_BYTES)):
        Engine(EngineConfig(max_adapter_bytes=PAGE_BYTES - 1), model=executor.model, arena=executor.arena)


def test_an_adapter_that_can_never_be_resident_is_refused() -> None:
    world = World(max_adapter_pages=3)
    huge = world.stage("huge", pages=4)
    with pytest.raises(InvalidInput, match=r"4 pages.*keeps 3"):
        world.add("r", huge)
