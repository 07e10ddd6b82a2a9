"""Memory that the GPUs of a stage map into each other: ``PeerRows`` for sums of few rows. Made by ``exchange``.

torch's symmetric memory does it, without multicast.
"""

import logging
import os
import socket
from itertools import permutations

import torch
from loraplex_kernels.gpu.lora import MAX_RANK, Site, partial_elements
from loraplex_kernels.gpu.peers import PeerRows
from torch import distributed
from torch._C._distributed_c10d import TCPStore

_MAX_ROWS = 512
"""Of a step: beyond, NCCL moves fewer bytes."""

_log = logging.getLogger(__name__)


def make_peer_rows(
    group: distributed.ProcessGroup,
    store: TCPStore,
    name: str,
    *,
    features: int,
    shrunk_features: dict[Site, int],
    device: torch.device,
    dtype: torch.dtype,
) -> PeerRows | None:
    """None where the GPUs of ``group`` do not reach each other's memory: on all its ranks alike. ``name``: of the group
    in ``store``. ``shrunk_features``: input features of a shard's o and down."""
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
        _log.warning("%s: GPUs %s do not reach each other's memory: all sums go through NCCL", name, ", ".join(places))
        return None
    # Not everywhere where torch is: CUDA builds on Linux.
    from torch.distributed import _symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(2, 2, _MAX_ROWS, features, dtype=dtype, device=device)
    flags = symmetric_memory.empty(_MAX_ROWS, size, dtype=torch.int32, device=device)
    flags.zero_()
    elements = max(partial_elements(_MAX_ROWS, inputs, site, MAX_RANK) for site, inputs in shrunk_features.items())
    shrunk = symmetric_memory.empty(2, elements, dtype=torch.float32, device=device)
    own_of = symmetric_memory.rendezvous(own, group=group.group_name)
    flags_of = symmetric_memory.rendezvous(flags, group=group.group_name)
    shrunk_of = symmetric_memory.rendezvous(shrunk, group=group.group_name)
    parts = [own_of.get_buffer(other, own.shape, dtype) for other in range(size)]
    rows = PeerRows(
        rank=rank,
        own=own,
        parts=torch.tensor(
            [[part[turn, buffer].data_ptr() for buffer in range(2) for part in parts] for turn in range(2)],
            device=device,
        ),
        shrunk=shrunk,
        shrunk_parts=torch.tensor(
            [
                [shrunk_of.get_buffer(other, shrunk.shape, shrunk.dtype)[turn].data_ptr() for other in range(size)]
                for turn in range(2)
            ],
            device=device,
        ),
        flags=torch.tensor(
            [flags_of.get_buffer(other, flags.shape, torch.int32).data_ptr() for other in range(size)], device=device
        ),
        counts=torch.zeros(_MAX_ROWS, dtype=torch.int32, device=device),
        mapped=(flags, own_of, shrunk_of, flags_of),
    )
    # Nobody's flags are raised before all are down.
    distributed.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.synchronize(device)
    return rows
