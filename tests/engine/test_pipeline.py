"""What the engine plans for a pipeline: a step for every stage, each request in one of them."""

import pytest
from loraplex.core.ids import BaseModelId, RequestId, TenantName
from loraplex.core.request import EngineRequest, SamplingParams
from loraplex.core.step import PENDING, StepPlan
from loraplex.engine import Engine, EngineConfig
from loraplex.testing.fake_executor import FakeExecutor, expected_tokens, fake_model


class Pipeline:
    """Keeps ``num_stages`` steps in flight, and as many as ``ahead`` more, as a driver does."""

    def __init__(self, num_stages: int, *, ahead: int = 0, **config: int) -> None:
        self.executor = FakeExecutor(
            model=fake_model(max_context_tokens=256),
            num_pages=200,
            max_in_flight=num_stages + ahead,
            num_stages=num_stages,
        )
        settings = {"max_running": 16, "max_step_tokens": 64, **config}
        self.engine = Engine(
            EngineConfig(**settings),  # type: ignore[arg-type]
            model=self.executor.model,
            arena=self.executor.arena,
            num_stages=num_stages,
        )
        self.in_flight: list[StepPlan] = []
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, *, prompt: int, max_tokens: int) -> EngineRequest:
        request = EngineRequest(
            request_id=RequestId(name),
            tenant=TenantName("t"),
            base_model_id=BaseModelId("fake-base"),
            adapter=None,
            prompt_token_ids=tuple((len(name) + position) % 50 + 3 for position in range(prompt)),
            sampling=SamplingParams(max_tokens=max_tokens, seed=hash(name) % 1000, ignore_eos=True),
            arrival_s=0.0,
            cache_salt=name,
        )
        self.engine.add(request, 0.0)
        return request

    def fill(self) -> None:
        while len(self.in_flight) < self.executor.max_in_flight:
            plan = self.engine.schedule(0.0).plan
            self.engine.validate()
            if plan is None:
                return
            self.executor.submit(plan)
            self.in_flight.append(plan)

    def turn(self) -> StepPlan:
        """Fills the pipeline; answers its oldest step."""
        self.fill()
        for output in self.engine.complete(self.executor.collect(), 0.0):
            self.tokens.setdefault(output.request_id, []).extend(token.token_id for token in output.tokens)
        self.engine.validate()
        return self.in_flight.pop(0)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_the_decoding_are_shared_out_among_the_stages_and_none_is_pending(num_stages: int) -> None:
    pipeline = Pipeline(num_stages)
    requests = [pipeline.add(f"r{index}", prompt=2 + index, max_tokens=20) for index in range(12)]
    sizes: list[int] = []
    while any(len(pipeline.tokens.get(request.request_id, ())) < 10 for request in requests):
        pipeline.turn()
        pipeline.fill()
        slots = [row.slot for plan in pipeline.in_flight for row in plan.rows if row.samples]
        assert len(set(slots)) == len(slots), "two steps sample for one request"
        assert all(row.token_ids != (PENDING,) for plan in pipeline.in_flight for row in plan.rows)
        sizes = [len(plan.rows) for plan in pipeline.in_flight]
    assert sizes == [12 // num_stages] * num_stages
    while pipeline.engine.num_unfinished:
        pipeline.turn()
    for request in requests:
        assert tuple(pipeline.tokens[request.request_id]) == expected_tokens(request, 20)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_step_ahead_holds_the_pending_tokens_of_the_oldest(num_stages: int) -> None:
    pipeline = Pipeline(num_stages, ahead=1)
    requests = [pipeline.add(f"r{index}", prompt=2 + index, max_tokens=20) for index in range(12)]
    while any(len(pipeline.tokens.get(request.request_id, ())) < 10 for request in requests):
        pipeline.turn()
        pipeline.fill()
    assert [len(plan.rows) for plan in pipeline.in_flight] == [12 // num_stages] * (num_stages + 1)
    oldest, newest = pipeline.in_flight[0], pipeline.in_flight[-1]
    assert {row.slot for row in newest.rows} == {row.slot for row in oldest.rows}
    assert all(row.token_ids == (PENDING,) for row in newest.rows)
    while pipeline.engine.num_unfinished:
        pipeline.turn()
    for request in requests:
        assert tuple(pipeline.tokens[request.request_id]) == expected_tokens(request, 20)


def test_chunks_of_one_prompt_follow_each_other_through_the_stages() -> None:
    pipeline = Pipeline(3, max_step_tokens=30)
    request = pipeline.add("long", prompt=45, max_tokens=3)
    pipeline.fill()
    assert [len(plan.rows[0].token_ids) for plan in pipeline.in_flight] == [10, 10, 10]
    assert [plan.rows[0].start for plan in pipeline.in_flight] == [0, 10, 20]
    while pipeline.engine.num_unfinished:
        pipeline.turn()
    assert tuple(pipeline.tokens["long"]) == expected_tokens(request, 3)


def test_a_lone_request_waits_for_its_own_token() -> None:
    pipeline = Pipeline(2)
    pipeline.add("alone", prompt=5, max_tokens=4)
    for _ in range(4):
        pipeline.fill()
        assert len(pipeline.in_flight) == 1
        pipeline.turn()
    assert pipeline.engine.num_unfinished == 0
