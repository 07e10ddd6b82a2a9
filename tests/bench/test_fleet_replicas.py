"""What a replica of the fleet is given, against what the simulator counts."""

import pytest
import torch
from loraplex.bench.fleet.options import Experiment, FleetBase
from loraplex.bench.fleet.replicas import executor_config
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import GroupPlan, Shape
from loraplex.cost.stages import stage_layers
from loraplex.model_runner.arena import page_tokens, plan_num_pages
from loraplex.model_runner.build import load_model_spec
from loraplex.model_runner.shard import plan_shards


@pytest.mark.parametrize("shape", [Shape(), Shape(tp=2), Shape(pp=2), Shape(pp=4), Shape(tp=2, pp=2)], ids=str)
@pytest.mark.parametrize("base", ["llama3-8b", "llama3-1b"])
def test_an_arena_has_room_for_what_the_simulator_counts(base: str, shape: Shape) -> None:
    pages, gpu = 1001, "h100-80gb"
    group = GroupPlan(name="g", shape=shape, gpu=gpu, bases=())
    spec = load_model_spec(f"random:{base}", BaseModelId(base))
    shards = plan_shards(spec, shape, stage_layers(spec, shape.pp))
    own = FleetBase(name=base, model=f"random:{base}")
    for device in ("cpu", "cuda"):
        experiment = Experiment(
            gpus=4, gpu=gpu, bases=(own,), profiles=(gpu,), loads={}, placements=("1x1",), device=device
        )
        config = executor_config(experiment, group, own, pages=pages, first_device=1)
        size = page_tokens(config, [shard.local for shard in shards])
        room = [
            plan_num_pages(
                config, shard.local, dtype=torch.bfloat16, device=torch.device(config.device), stage=shard.stage
            )
            for shard in shards
        ]
        # The simulator's pages have 16 tokens, and so have those on a CPU.
        assert min(room) == pages * 16 // size
        assert size == 16 if device == "cpu" or (base, shape.pp) == ("llama3-8b", 1) else size > 16
