"""How the ranks of a group exchange tensors: torch.distributed, NCCL between GPUs and gloo between CPUs.

Two sums a layer within a stage, one gather of the logits, and the hidden states handed to the next stage, shard to
shard. Counts its calls: that is how others see that the rank gets on.
Legend: T tokens, D hidden, B sampled rows, V vocabulary.
"""

import os
import socket
from collections import deque
from datetime import timedelta

import psutil
import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore
from torch.nn import functional

from loraplex.model_runner.shard import Shard

_TIMEOUT = timedelta(hours=1)
"""Who waits for a rank that is gone or hangs is ended by the group's executor, long before."""


class Exchange:
    """The Peers of a rank. One in a process."""

    def __init__(
        self, shard: Shard, *, host: str, store_port: int, device: torch.device, dtype: torch.dtype, max_in_flight: int
    ) -> None:
        """Returns when all ranks are there. ``dtype`` of the hidden states."""
        shape = shard.shape
        # gloo would listen where this machine's name leads, which need not be where the other ranks reach it.
        interface = _interface_towards(host)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        store = TCPStore(host, store_port, is_master=False, timeout=_TIMEOUT)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=shard.rank, world_size=shape.num_ranks, timeout=_TIMEOUT
        )
        # Every rank must take part in the making of every group.
        groups = [
            distributed.new_group(list(range(stage * shape.tp, (stage + 1) * shape.tp))) for stage in range(shape.pp)
        ]
        self._stage = groups[shard.stage]
        self._shard = shard
        self._device = device
        self._dtype = dtype
        self._max_in_flight = max_in_flight
        self._sent: deque[tuple[distributed.Work, torch.Tensor]] = deque()
        self.progress = 0
        """Calls so far."""

    def all_reduce_(self, x: torch.Tensor) -> None:
        if self._shard.shape.tp > 1:
            distributed.all_reduce(x, group=self._stage)
        self.progress += 1

    def gather_logits(self, logits_BV: torch.Tensor) -> torch.Tensor:
        shard = self._shard
        if shard.shape.tp > 1:
            padding = shard.vocabulary_share - logits_BV.shape[1]
            own_BV = functional.pad(logits_BV, (0, padding)) if padding else logits_BV.contiguous()
            parts = [torch.empty_like(own_BV) for _ in range(shard.shape.tp)]
            distributed.all_gather(parts, own_BV, group=self._stage)
            logits_BV = torch.cat(parts, dim=1)[:, : shard.model.vocab_size]
        self.progress += 1
        return logits_BV

    def receive_hidden(self, num_tokens: int) -> torch.Tensor:
        hidden_TD = torch.empty((num_tokens, self._shard.model.hidden_size), dtype=self._dtype, device=self._device)
        distributed.recv(hidden_TD, self._shard.rank - self._shard.shape.tp)
        self.progress += 1
        return hidden_TD

    def send_hidden(self, residual_TD: torch.Tensor) -> None:
        # The tensor must live until it is sent; of steps that are not in flight any more it surely is.
        if len(self._sent) == self._max_in_flight:
            self._sent.popleft()[0].wait()
        work = distributed.isend(residual_TD, self._shard.rank + self._shard.shape.tp)
        assert work is not None, "the rank is not in its own group"
        self._sent.append((work, residual_TD))
        self.progress += 1


def _interface_towards(host: str) -> str | None:
    """Of this machine's network interfaces the one that leads there; None when that cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: the system only chooses the way.
        probe.connect((host, 9))
        address = probe.getsockname()[0]
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            return str(name)
    return None
