"""What the config says of base models: directory, spec and view of each, what a replica needs, how many there shall be.

Run in the controller actor.
"""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
from loraplex.config.platform import DEMO_MODEL, BaseModelConfig, PlatformConfig
from loraplex.controller.fleet.state import FleetBase
from loraplex.core.control import BaseModelView
from loraplex.core.errors import BadConfig
from loraplex.core.ids import BaseModelId
from loraplex.core.model import ModelSpec
from loraplex.core.plan import BasePlacement, GroupPlan, Plan, Shape
from loraplex.demo.base import prepare_demo_base
from loraplex.model_runner.build import RANDOM_PREFIX, load_model_spec
from loraplex.model_runner.random_tokenizer import write_random_tokenizer

from loraplex_deployments.build_id import build_id


def model_source(config: PlatformConfig, base: BaseModelConfig) -> str:
    """The ``model`` argument of the model runner; prepares the demo base if it is not yet in the cache."""
    if base.model == DEMO_MODEL:
        return str(prepare_demo_base(config.root / "models", lambda _message: None))
    return base.model


def base_model_views(
    config: PlatformConfig,
) -> tuple[dict[BaseModelId, ModelSpec], tuple[BaseModelView, ...]]:
    """Raises BadConfig when a model cannot be read."""
    specs: dict[BaseModelId, ModelSpec] = {}
    views: list[BaseModelView] = []
    for base in config.base_models:
        source = model_source(config, base)
        spec = load_model_spec(source, base.base_model_id)
        specs[base.base_model_id] = spec
        path = Path(source)
        tokenizer = _tokenizer(config, base, source, spec)
        if not (tokenizer / "tokenizer_config.json").is_file():
            raise BadConfig(
                f"base model {base.id}: {tokenizer} holds no tokenizer; name its directory as `tokenizer`",
                param="tokenizer",
            )
        views.append(
            BaseModelView(
                base_model_id=base.base_model_id,
                directory=str(tokenizer),
                max_context_tokens=spec.max_context_tokens,
                created_s=path.stat().st_mtime if path.exists() else time.time(),
            )
        )
    return specs, tuple(views)


def fleet_bases(
    config: PlatformConfig, specs: Mapping[BaseModelId, ModelSpec] = MappingProxyType({})
) -> dict[BaseModelId, FleetBase]:
    """``specs``: as ``base_model_views`` found them; a base without one takes any shape."""
    return {
        base.base_model_id: FleetBase(
            base_model_id=base.base_model_id,
            gpus_per_rank=base.num_gpus,
            shape=_default_shape(base),
            release=release(config, base),
            # Paced replicas take the time of another model, and compute nothing.
            model=None if base.paced is not None else specs.get(base.base_model_id),
            itemsize=4 if base.executor.dtype == "float32" else 2,
            memory_fraction=base.executor.memory_fraction,
        )
        for base in config.base_models
    }


def release(config: PlatformConfig, base: BaseModelConfig) -> str:
    """Of the replicas of a base: the build, and a digest of the settings that they get, but for how many there are."""
    read = (msgspec.structs.replace(base, replicas=1), config.replica, config.registry, config.data_dir)
    digest = hashlib.sha256(msgspec.json.encode(read, order="sorted")).hexdigest()
    return f"{build_id()} {digest[:8]}"


def default_plan(config: PlatformConfig) -> Plan:
    """Each replica of the config in a group of its own; every replica takes every adapter of its base."""
    groups = tuple(
        GroupPlan(
            name=f"{base.id}-{index}",
            shape=_default_shape(base),
            bases=(BasePlacement(base_model_id=base.base_model_id),),
        )
        for base in config.base_models
        for index in range(base.replicas)
    )
    return Plan(version=0, groups=groups)


def _default_shape(base: BaseModelConfig) -> Shape:
    runs = base.executor if base.paced is None else base.paced
    return Shape(tp=runs.tp, pp=runs.pp)


def _tokenizer(config: PlatformConfig, base: BaseModelConfig, source: str, spec: ModelSpec) -> Path:
    """Its directory. A random model that names none gets one of its own beside the demo base."""
    if base.tokenizer is None and source.startswith(RANDOM_PREFIX):
        name = f"random-{source.removeprefix(RANDOM_PREFIX)}-tokenizer"
        return write_random_tokenizer(spec, config.root / "models" / name)
    return Path(base.tokenizer or source)
