"""What a GPU can do at most: memory, matrix, host and peer rates, and where each number comes from.

Owns the table of known GPUs. ``kernels/benchmarks/ceilings.py`` prints the same struct for the machine that it runs on.
Called by ``roofline`` and the benchmarks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loraplex.core.errors import BadConfig

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Of one GPU. Rates are per second, sizes in bytes."""

    name: str
    source: str
    """How the numbers were had: measured (with what), or analytic (from which datasheet)."""
    measured: bool
    copy_bytes_per_s: float
    """Device memory, read plus written, by a plain copy."""
    gemm_flops_per_s: tuple[tuple[int, float], ...]
    """(rows, FLOP/s) of matrix products of a model's shapes, rows ascending: few rows do not fill the matrix units."""
    host_bytes_per_s: float
    """Pinned host memory to the device."""
    memory_bytes: int
    link_bytes_per_s: float = 0.0
    """To another GPU of the host, in one direction; 0: it has none."""
    collective_s: float = 0.0
    """Of the smallest all-reduce or send between GPUs."""

    def flops_per_s(self, rows: FloatArray) -> FloatArray:
        """At ``rows`` (any shape): linear in log2(rows) between the known points, constant beyond them."""
        known = np.array(self.gemm_flops_per_s, dtype=np.float64)
        return np.interp(np.log2(np.maximum(rows, 1.0)), np.log2(known[:, 0]), known[:, 1])


def _from_datasheet(
    name: str,
    *,
    bytes_per_s: float,
    flops_per_s: float,
    host: float,
    gib: int,
    link: float,
    collective_s: float = 12e-6,
) -> Ceilings:
    """The shares of the datasheet that the H100 was measured to reach: 0.90 of the bandwidth, 0.71 of the dense bf16
    FLOP/s at 8192 rows and 0.525 at 256."""
    return Ceilings(
        name=name,
        source="analytic: datasheet x the shares that the H100 reaches",
        measured=False,
        copy_bytes_per_s=0.90 * bytes_per_s,
        gemm_flops_per_s=((256, 0.525 * flops_per_s), (8192, 0.71 * flops_per_s)),
        host_bytes_per_s=host,
        memory_bytes=gib << 30,
        link_bytes_per_s=link,
        collective_s=collective_s,
    )


_CEILINGS: Mapping[str, Ceilings] = {
    ceilings.name: ceilings
    for ceilings in (
        Ceilings(
            name="h100-80gb",
            # 256 rows: the decode GEMMs and the head of an 8B Llama, 15.0 GB of weights, in 7.4 ms.
            source="measured on one H100 80GB HBM3 (torch 2.11, bf16): copy, cuBLAS at 256 and 8192 rows, pinned copy; "
            "link and collectives analytic",
            measured=True,
            copy_bytes_per_s=3.02e12,
            gemm_flops_per_s=((256, 519e12), (8192, 700e12)),
            host_bytes_per_s=54e9,
            memory_bytes=80 << 30,
            link_bytes_per_s=360e9,
            collective_s=12e-6,
        ),
        _from_datasheet("h200-141gb", bytes_per_s=4.8e12, flops_per_s=989e12, host=54e9, gib=141, link=360e9),
        _from_datasheet("a100-80gb", bytes_per_s=2.04e12, flops_per_s=312e12, host=25e9, gib=80, link=240e9),
        _from_datasheet("l40s-48gb", bytes_per_s=0.864e12, flops_per_s=362e12, host=25e9, gib=48, link=20e9),
        # Without peer access each all-reduce passes through host memory: a GPU for which tp does not pay.
        _from_datasheet(
            "h100-pcie", bytes_per_s=2.0e12, flops_per_s=756e12, host=25e9, gib=80, link=6e9, collective_s=100e-6
        ),
    )
}
_DEVICE_NAMES = (
    ("H100 80GB HBM3", "h100-80gb"),
    ("H200", "h200-141gb"),
    ("A100-SXM4-80GB", "a100-80gb"),
    ("L40S", "l40s-48gb"),
)


def known_gpus() -> tuple[str, ...]:
    return tuple(_CEILINGS)


def ceilings_of(gpu: str) -> Ceilings:
    """By name, e.g. ``h100-80gb``. BadConfig listing the known ones."""
    found = _CEILINGS.get(gpu)
    if found is None:
        raise BadConfig(f"GPU {gpu!r} has no known ceilings (known: {', '.join(_CEILINGS)})", param="gpu")
    return found


def ceilings_of_device(device_name: str) -> Ceilings | None:
    """By the name that CUDA gives a device, e.g. ``NVIDIA H100 80GB HBM3``; None when it is not in the table (a slice
    of a GPU is not)."""
    if "MIG" in device_name:
        return None
    return next((_CEILINGS[gpu] for part, gpu in _DEVICE_NAMES if part in device_name), None)
