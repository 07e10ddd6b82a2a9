"""Choices of ``tuning`` that ``bench_lora`` compares."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

from loraplex_kernels.gpu import tuning
from loraplex_kernels.gpu.tuning import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """None: what the kernels choose."""

    tile_rows: int | None = None
    schedule: Schedule | None = None
    fuses_norm: bool | None = None
    configs: dict[str, dict[str, int | bool]] | None = None
    """Of functions in ``tuning``, the changes to what they return."""
    overlap: bool = True


def of(tile_rows: int, schedule: Schedule, **changes: object) -> Variant:
    return Variant(tile_rows=tile_rows, schedule=schedule, **changes)


VARIANTS = {
    "default": Variant(),
    "1-beside": of(1, Schedule.BESIDE),
    "1-serial": of(1, Schedule.SERIAL),
    "1-serial-no-overlap": of(1, Schedule.SERIAL, overlap=False),
    "1-serial-norm-apart": of(1, Schedule.SERIAL, fuses_norm=False),
    "1-serial-norm-fused": of(1, Schedule.SERIAL, fuses_norm=True),
    "16-beside": of(16, Schedule.BESIDE),
    "16-serial": of(16, Schedule.SERIAL),
    "16-serial-no-overlap": of(16, Schedule.SERIAL, overlap=False),
    "16-serial-norm-fused": of(16, Schedule.SERIAL, fuses_norm=True),
    "16-serial-256x4wx1": of(
        16, Schedule.SERIAL, configs={"expand_config": {"block_n": 256, "num_warps": 4, "blocks": 1}}
    ),
    "16-serial-256x4wx2": of(
        16, Schedule.SERIAL, configs={"expand_config": {"block_n": 256, "num_warps": 4, "blocks": 2}}
    ),
    "16-serial-128x4wx2": of(
        16, Schedule.SERIAL, configs={"expand_config": {"block_n": 128, "num_warps": 4, "blocks": 2}}
    ),
    "16-serial-128x4wx4": of(
        16, Schedule.SERIAL, configs={"expand_config": {"block_n": 128, "num_warps": 4, "blocks": 4}}
    ),
    "32-serial": of(32, Schedule.SERIAL),
    "64-serial": of(64, Schedule.SERIAL),
    "64-beside": of(64, Schedule.BESIDE),
    "64-serial-k256x3": of(64, Schedule.SERIAL, configs={"shrink_config": {"block_k": 256, "num_stages": 3}}),
}


@contextmanager
def chosen(variant: Variant | None) -> Iterator[None]:
    """The variant instead of what ``tuning`` says."""
    changes: dict[str, Callable[..., object]] = {}
    if variant is not None:
        if variant.schedule is not None:
            changes["schedule"] = lambda *_: variant.schedule
        if variant.fuses_norm is not None:
            changes["fuses_norm"] = lambda *_: variant.fuses_norm
        if not variant.overlap:
            changes["overlaps"] = lambda _: False
        for name, fields in (variant.configs or {}).items():
            function = getattr(tuning, name)
            changes[name] = lambda *args, f=function, fields=fields, **kw: replace(f(*args, **kw), **fields)
    if not changes:
        yield
        return
    with patch.multiple(tuning, **changes):
        yield
