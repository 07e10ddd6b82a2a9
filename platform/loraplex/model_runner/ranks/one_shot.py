"""Sums of small tensors over the shards of a stage: every GPU reads the others' parts over peer memory and adds them.

One kernel and no hand-over between the GPUs, so a few microseconds where a ring takes more; for large tensors a ring
moves fewer bytes. torch's symmetric memory does it, without multicast. Made by ``exchange``.
"""

import logging
import os
import socket
from itertools import permutations

import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore

_MAX_BYTES = 1 << 20
"""Of a tensor: beyond, NCCL is as fast."""

_ALIGN_BYTES = 16

_log = logging.getLogger(__name__)


class OneShotSum:
    def __init__(self, group: distributed.ProcessGroup, *, device: torch.device, dtype: torch.dtype) -> None:
        """All ranks of ``group`` at once; ``dtype``: of what is to be summed."""
        # Not everywhere where torch is: CUDA builds on Linux.
        from torch.distributed import _symmetric_memory as symmetric_memory

        self._name = group.group_name
        self._buffer = symmetric_memory.empty(_MAX_BYTES // dtype.itemsize, dtype=dtype, device=device)
        symmetric_memory.rendezvous(self._buffer, group=self._name)

    def takes(self, x: torch.Tensor) -> bool:
        return x.numel() <= self._buffer.numel() and x.nbytes % _ALIGN_BYTES == 0 and x.is_contiguous()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """A new tensor, the same bits on all ranks. On the current stream; can be captured in a graph."""
        own = self._buffer[: x.numel()].view(x.shape)
        summed: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(own, x, "sum", self._name)
        return summed


def make_one_shot_sum(
    group: distributed.ProcessGroup, store: TCPStore, name: str, *, device: torch.device, dtype: torch.dtype
) -> OneShotSum | None:
    """None where the GPUs of ``group`` do not reach each other's memory, and for a ``dtype`` that torch does not sum
    this way; on all ranks alike. ``name``: of the group in ``store``."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    store.set(f"{name} rank {rank}", f"{socket.gethostname()} {device.index}")
    places = [store.get(f"{name} rank {other}").decode() for other in range(size)]
    hosts, indices = zip(*(place.split() for place in places), strict=True)
    # torch tells the GPUs of a group apart by their index, so each process must see all of them.
    reach = (
        len(set(hosts)) == 1
        and len(set(indices)) == size
        and all(torch.cuda.can_device_access_peer(int(a), int(b)) for a, b in permutations(indices, 2))
    )
    store.set(f"{name} reach {rank}", str(reach))
    if any(store.get(f"{name} reach {other}") != b"True" for other in range(size)):
        _log.warning(
            "%s: GPUs %s do not reach each other's memory: small sums go through NCCL", name, ", ".join(places)
        )
        return None
    return OneShotSum(group, device=device, dtype=dtype)
