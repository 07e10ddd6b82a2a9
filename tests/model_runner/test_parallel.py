"""Groups of ranks give the tokens of one rank: every shape, family and LoRA module, under chunked prefill, prefix hits,
preemption and adapters that come and go."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from loraplex.core.plan import Shape
from loraplex.core.request import EngineRequest
from loraplex.cost.stages import stage_layers
from loraplex.model_runner import ExecutorBase, ExecutorConfig, build_executor
from loraplex.model_runner.adapter_layout import plan_shard_layout
from loraplex.model_runner.ranks.group_executor import GroupExecutor
from loraplex.model_runner.shard import plan_shards

from tests.model_runner.parallel_models import (
    BASE,
    FAMILIES,
    Adapter,
    Outcome,
    load_model_spec_of,
    make_requests,
    run_load,
    write_adapters,
    write_model,
)
from tests.model_runner.prepared import prepare_each

DEFAULT = [
    ("llama", Shape(tp=2, pp=1)),
    ("qwen2-2kv", Shape(tp=4, pp=1)),
    ("mistral", Shape(tp=1, pp=2)),
    ("qwen3", Shape(tp=1, pp=3)),
    ("qwen2", Shape(tp=2, pp=2)),
]
SHAPES = [Shape(tp=tp, pp=pp) for tp, pp in ((2, 1), (4, 1), (1, 2), (1, 3), (2, 2))]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    model: str
    adapters: tuple[Adapter, ...]
    requests: list[EngineRequest]
    expected: Outcome
    """On one rank."""

    def build(self, shape: Shape, *, device: str = "cpu", page_size: int = 4) -> ExecutorBase:
        """With pages for the largest adapter and, of 4 tokens, for two or three of six requests."""
        config = ExecutorConfig(
            device=device,
            dtype="float32",
            tp=shape.tp,
            pp=shape.pp,
            num_pages=self.largest_adapter_pages(shape, page_size) + 20,
            page_size=page_size,
            num_threads=1,
            max_rows=8,
            max_step_tokens=16,
        )
        return build_executor(config, model=self.model, base_model_id=BASE)

    def largest_adapter_pages(self, shape: Shape, page_size: int) -> int:
        spec = load_model_spec_of(Path(self.model))
        return max(
            plan_shard_layout(
                adapter.manifest.blocks, shard, page_bytes=page_size * shard.local.kv_elements_per_token * 4, itemsize=4
            ).num_pages
            for adapter in self.adapters
            for shard in plan_shards(spec, shape, stage_layers(spec, shape.pp))
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """Of a family of ``FAMILIES``; made once."""
    made: dict[str, World] = {}

    def get(family: str) -> World:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            model = write_model(directory / "model", family)
            adapters = write_adapters(directory, load_model_spec_of(Path(model)))
            requests = make_requests(adapters, count=12, output_tokens=8)
            world = World(model=model, adapters=adapters, requests=requests, expected=Outcome.none())
            executor = world.build(Shape())
            expected = run_load(executor, adapters, requests)
            executor.close()
            made[family] = World(model=model, adapters=adapters, requests=requests, expected=expected)
        return made[family]

    return get


def run_group(world: World, executor: ExecutorBase) -> Outcome:
    try:
        outcome = run_load(executor, world.adapters, world.requests)
    finally:
        executor.close()
    check_tokens(world, outcome)
    return outcome


def check_tokens(world: World, outcome: Outcome) -> None:
    assert outcome.token_ids == world.expected.token_ids
    for request_id, tokens in outcome.tokens.items():
        for token, wanted in zip(tokens, world.expected.tokens[request_id], strict=True):
            if wanted.logprob is None:
                assert token.logprob is None
                continue
            assert token.logprob == pytest.approx(wanted.logprob, abs=1e-3)
            assert [top.token_id for top in token.top_logprobs] == [top.token_id for top in wanted.top_logprobs]


def check_same(world: World, shape: Shape) -> None:
    outcome = run_group(world, world.build(shape))
    assert outcome.preemptions > 0, "nobody was preempted"
    assert outcome.cached_tokens > 0, "no prefix was hit"
    assert outcome.adapter_loads > len(world.adapters), "no adapter had to leave and come again"
    assert outcome.most_in_flight == shape.pp


@pytest.mark.parametrize(("family", "shape"), DEFAULT, ids=lambda value: _name(value))
def test_a_group_gives_the_tokens_of_one_rank(world: Callable[[str], World], family: str, shape: Shape) -> None:
    check_same(world(family), shape)


def test_steps_that_were_prepared_are_the_same(world: Callable[[str], World]) -> None:
    executor = world("llama").build(Shape(tp=2, pp=1))
    assert isinstance(executor, GroupExecutor)
    executor.prepares = True
    prepare_each(executor)
    run_group(world("llama"), executor)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda value: _name(value))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_shape(world: Callable[[str], World], family: str, shape: Shape) -> None:
    check_same(world(family), shape)


@pytest.mark.alone
@pytest.mark.parametrize("shape", SHAPES, ids=lambda value: _name(value))
def test_a_group_of_gpus_gives_the_tokens_of_one_cpu(world: Callable[[str], World], shape: Shape) -> None:
    if torch.cuda.device_count() < shape.num_ranks:
        pytest.skip(f"{shape.num_ranks} CUDA devices are needed")
    outcome = run_group(world("qwen2"), world("qwen2").build(shape, device="cuda", page_size=16))
    assert outcome.adapter_loads > 0
    assert outcome.most_in_flight > shape.pp, "no step was planned ahead of its tokens"


def _name(value: object) -> str:
    return f"{value.tp}x{value.pp}" if isinstance(value, Shape) else str(value)
