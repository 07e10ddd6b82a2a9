"""Manifests of made-up adapters: which blocks they have, and which one each request asks for.

Their weights are drawn by ``ExecutorBase.stage_random_adapter`` straight into host memory: thousands of adapters need
no files. Knows nothing of engines. Called by ``session`` and by tests.
"""

import hashlib
from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.ids import Digest
from loraplex.core.model import LORA_MODULES, ModelSpec


class Popularity(StrEnum):
    """How often each adapter is asked for."""

    ROUND_ROBIN = "round-robin"
    UNIFORM = "uniform"
    """Drawn with equal probability."""
    ZIPF = "zipf"
    """Drawn with probability proportional to 1 / rank ** exponent."""
    NONE = "none"
    """All requests are for the plain base; the adapters stand by."""


def random_manifests(
    model: ModelSpec, *, count: int, lora_ranks: Sequence[int], modules: Sequence[str] = LORA_MODULES, seed: int = 0
) -> tuple[AdapterManifest, ...]:
    """``count`` adapters on ``modules`` of every layer; their ranks are ``lora_ranks`` in turn. Equal arguments give
    equal digests."""
    ordered = [module for module in LORA_MODULES if module in modules]
    blocks = [
        tuple(
            AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=1.0)
            for layer in range(model.num_layers)
            for module in ordered
        )
        for lora_rank in lora_ranks
    ]
    manifests = []
    for index in range(count):
        members = blocks[index % len(blocks)]
        identity = f"random adapter {seed} {index} {lora_ranks[index % len(blocks)]} {ordered}"
        num_elements = sum(block.lora_rank * sum(model.projection_shape(block.module)) for block in members)
        manifests.append(
            AdapterManifest(
                digest=Digest(hashlib.sha256(identity.encode()).hexdigest()),
                base_model_id=model.base_model_id,
                blocks=members,
                num_bytes=2 * num_elements,
            )
        )
    return tuple(manifests)


def draw_adapters(
    num_requests: int, num_adapters: int, popularity: Popularity, *, zipf_exponent: float = 1.0, seed: int = 0
) -> list[int | None]:
    """The adapter of each request, 0 <= a < num_adapters; None: the plain base."""
    if num_adapters == 0 or popularity is Popularity.NONE:
        return [None] * num_requests
    if popularity is Popularity.ROUND_ROBIN:
        return [request % num_adapters for request in range(num_requests)]
    weights = np.ones(num_adapters)
    if popularity is Popularity.ZIPF:
        weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -zipf_exponent
    draws = np.random.default_rng(seed).choice(num_adapters, size=num_requests, p=weights / weights.sum())
    return [int(adapter) for adapter in draws]
