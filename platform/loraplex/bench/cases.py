"""The loads of the engine's table, by name. Pure data; called by ``sweep``."""

import msgspec

from loraplex.bench.options import EngineLoad
from loraplex.bench.random_adapters import Popularity
from loraplex.core.errors import BadConfig

SINGLE_TTFT = "single-ttft"
"""Not a load but lone requests of 256 tokens: base, warm and cold adapter."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MANY = EngineLoad(
    requests=4000, lora_ranks=(8,), modules=_ATTENTION, popularity=Popularity.UNIFORM, concurrency=256, adapters=2000
)
_CAP_BYTES = 6_000_000_000


def _load(requests: int, adapters: int, *, resident: bool = True, ranks: tuple[int, ...] = (16,)) -> EngineLoad:
    return EngineLoad(requests=requests, adapters=adapters, resident=resident, lora_ranks=ranks)


CASES: dict[str, EngineLoad] = {
    "base": _load(256, 0),
    "base-lora-32-idle": msgspec.structs.replace(_load(256, 32), popularity=Popularity.NONE),
    "lora-1": _load(256, 1),
    "lora-32": _load(256, 32),
    "lora-256": _load(256, 256),
    "cold-32": _load(256, 32, resident=False),
    "cold-256": _load(256, 256, resident=False),
    "1-base": _load(1, 0),
    "1-lora-1": _load(1, 1),
    "32-base": _load(32, 0),
    "32-lora-1": _load(32, 1),
    "32-lora-32": _load(32, 32),
    "64-base": _load(64, 0),
    "64-lora-32": _load(64, 32),
    "64-lora-8": _load(64, 8),
    "512-base": _load(512, 0),
    "512-lora-64": _load(512, 64),
    "rank-8": _load(64, 64, ranks=(8,)),
    "rank-16": _load(64, 64, ranks=(16,)),
    "rank-32": _load(64, 64, ranks=(32,)),
    "rank-64": _load(64, 64, ranks=(64,)),
    "rank-mixed": _load(64, 64, ranks=(8, 16, 32, 64)),
    "many-5-capped": msgspec.structs.replace(_MANY, adapters=5, adapter_bytes_cap=_CAP_BYTES),
    "many-2000-capped": msgspec.structs.replace(_MANY, adapter_bytes_cap=_CAP_BYTES),
    "many-5": msgspec.structs.replace(_MANY, adapters=5),
    "many-2000": _MANY,
}
"""256 + 128 tokens each. NUMBER-...: that many requests. idle: adapters resident, all requests for the base. cold:
adapters in host memory at the start. many: rank 8 on the attention projections, uniform popularity, 256 of 4,000
requests at a time."""


def chosen_cases(names: tuple[str, ...], shrink: int) -> dict[str, EngineLoad | None]:
    """Name -> load, its numbers divided by ``shrink``; None for ``single-ttft``. No names: all. BadConfig."""
    known = (*CASES, SINGLE_TTFT)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadConfig(f"no case is called {unknown[0]!r} (known: {', '.join(known)})", param="cases")
    return {name: _shrunk(CASES[name], shrink) if name in CASES else None for name in names or known}


def _shrunk(load: EngineLoad, by: int) -> EngineLoad:
    def less(number: int) -> int:
        return max(1, number // by)

    return msgspec.structs.replace(
        load,
        requests=less(load.requests),
        input_tokens=less(load.input_tokens),
        output_tokens=max(2, load.output_tokens // by),
        adapters=less(load.adapters) if load.adapters else 0,
        concurrency=None if load.concurrency is None else less(load.concurrency),
    )
