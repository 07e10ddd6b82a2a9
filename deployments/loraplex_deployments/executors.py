"""The executor of a replica: real or paced, on one rank or on a group of Ray actors, alone on its GPUs or by turns with
the other bases of its group.

Called in the replica's actor.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
from loraplex.config.platform import BaseModelConfig, PlatformConfig
from loraplex.core.errors import BadConfig
from loraplex.core.fleet import ReplicaTarget
from loraplex.core.ids import BaseModelId
from loraplex.core.plan import Shape
from loraplex.core.step import Executor
from loraplex.cost.memory import shared_pages
from loraplex.model_runner.build import build_executor, load_model_spec
from loraplex.model_runner.config import ExecutorConfig
from loraplex.model_runner.group_part import Neighbour, part_of_group
from loraplex.model_runner.turns.executor import PreparingExecutor, TurnExecutor
from loraplex.model_runner.turns.queue import TurnQueue
from loraplex.testing.paced_config import PacedConfig
from ray.util.placement_group import PlacementGroup, get_current_placement_group

from loraplex_deployments.base_models import model_source
from loraplex_deployments.rank_actors import RayRankLauncher


def executor_of(target: ReplicaTarget, base: BaseModelConfig, config: PlatformConfig, *, num_gpus: float) -> Executor:
    """Loads the base. ``num_gpus``: what each rank takes of its bundle's GPU. BadConfig, ExecutorLost."""
    group = get_current_placement_group()
    assert group is not None, "the actuator starts replicas in their group"
    bases = {one.base_model_id: one for one in config.base_models}
    if len(target.bases) < 2:
        return _executor(target, base, bases, config, group, num_gpus)
    queue = TurnQueue(_turn_file(group), num_places=len(target.bases))
    try:
        return TurnExecutor(_executor(target, base, bases, config, group, num_gpus), queue)
    except BaseException:
        queue.close()
        raise


def _turn_file(group: PlacementGroup) -> str:
    """The engines of a group are all in its first bundle, on one node, whose processes see the same directory."""
    return str(Path(tempfile.gettempdir()) / f"loraplex-turns-{group.id.hex()}")


def _executor(
    target: ReplicaTarget,
    base: BaseModelConfig,
    bases: Mapping[BaseModelId, BaseModelConfig],
    config: PlatformConfig,
    group: PlacementGroup,
    num_gpus: float,
) -> PreparingExecutor:
    model = model_source(config, base)
    if base.paced is not None:
        return _paced_executor(target, base, bases, model)
    share = next((one.arena_share for one in target.bases if one.base_model_id == base.base_model_id), 1.0)
    neighbours = [
        Neighbour(
            model=load_model_spec(model_source(config, bases[one.base_model_id]), one.base_model_id),
            config=_executor_config(bases[one.base_model_id], target.shape),
            arena_share=one.arena_share,
        )
        for one in target.bases
        if one.base_model_id != base.base_model_id
    ]
    return build_executor(
        part_of_group(_executor_config(base, target.shape), neighbours, arena_share=share),
        model=model,
        base_model_id=base.base_model_id,
        launcher=RayRankLauncher(group, base, config, num_gpus=num_gpus) if target.shape.num_ranks > 1 else None,
    )


def _executor_config(base: BaseModelConfig, shape: Shape) -> ExecutorConfig:
    """The config's, in the shape of the plan. A cut into stages holds for as many stages as it has."""
    config = base.executor
    return msgspec.structs.replace(
        config,
        # Each rank's bundle reserves the CPUs, so Ray does not tell torch of them.
        num_threads=config.num_threads or max(1, int(base.num_cpus)),
        tp=shape.tp,
        pp=shape.pp,
        stage_layers=config.stage_layers if config.pp == shape.pp else None,
    )


def _paced_executor(
    target: ReplicaTarget, base: BaseModelConfig, bases: Mapping[BaseModelId, BaseModelConfig], model: str
) -> PreparingExecutor:
    # Only here: no replica that computes needs the cost model and numba.
    from loraplex.testing.paced_executor import build_paced_executor

    return build_paced_executor(
        _paced(base, target.shape),
        model=load_model_spec(model, base.base_model_id),
        engine=base.engine,
        num_pages=_paced_pages(target, base, bases) if target.bases else base.executor.num_pages,
    )


def _paced_pages(target: ReplicaTarget, base: BaseModelConfig, bases: Mapping[BaseModelId, BaseModelConfig]) -> int:
    """Its part of the arena that it would have alone, or of what the group's bases leave in their profiles."""
    from loraplex.testing.paced_executor import paced_cost

    shares = {one.base_model_id: one.arena_share for one in target.bases}
    if base.executor.num_pages is not None:
        num_pages = int(base.executor.num_pages * shares[base.base_model_id] / sum(shares.values()))
    else:
        memories = [paced_cost(_paced(bases[one], target.shape), bases[one].engine, one).memory for one in shares]
        num_pages = dict(zip(shares, shared_pages(memories, tuple(shares.values())), strict=True))[base.base_model_id]
    if num_pages < 1:
        raise BadConfig(f"{base.id} does not fit beside the group's other bases")
    return num_pages


def _paced(base: BaseModelConfig, shape: Shape) -> PacedConfig:
    if base.paced is None:
        raise BadConfig(f"{base.id} is not paced, as other bases of its group are", param="paced")
    return msgspec.structs.replace(base.paced, tp=shape.tp, pp=shape.pp)
