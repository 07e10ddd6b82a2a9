"""How the ranks of a group exchange tensors: torch.distributed, NCCL between GPUs and gloo between CPUs. Small sums
between GPUs are a kernel's matter, over ``peer_memory``.

Two sums a layer within a stage, one gather of the logits, the hidden states handed to the next stage, shard to shard,
and between GPUs the drawn tokens handed back to the first stage. Counts its calls: that is how others see that the rank
gets on. Legend: T tokens, D hidden, B sampled rows, V vocabulary.
"""

import os
import socket
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil
import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore
from torch.nn import functional

from loraplex.model_runner.shard import Shard

if TYPE_CHECKING:
    from loraplex_kernels.gpu.peers import PeerRows

_TIMEOUT = timedelta(hours=1)
"""Who waits for a rank that is gone or hangs is ended by the group's executor, long before."""


class Exchange:
    """The Peers of a rank. One in a process."""

    def __init__(
        self, shard: Shard, *, host: str, store_port: int, device: torch.device, dtype: torch.dtype, max_in_flight: int
    ) -> None:
        """Returns when all ranks are there. ``dtype`` of the hidden states; ``max_in_flight``: steps between a tensor
        that was sent and the moment when it surely has arrived."""
        shape = shard.shape
        store = TCPStore(host, store_port, is_master=False, timeout=_TIMEOUT)
        if device.type == "cuda":
            _start_nccl(store, shard, device)
        else:
            _start_gloo(store, shard, host)
        # A communicator carries one thing at a time: a stage that sent by the one from which it receives would wait for
        # the stage before it whenever it has something for the next one. So each link has its own.
        width, last = shape.tp, shape.pp - 1
        own = _own_group([range(stage * width, (stage + 1) * width) for stage in range(shape.pp)], shard.rank)
        assert own is not None, "every rank is of a stage"
        self._stage = own
        hidden = {
            stage: _own_group([(rank, rank + width) for rank in range(stage * width, (stage + 1) * width)], shard.rank)
            for stage in range(last)
        }
        self._from_before, self._to_next = hidden.get(shard.stage - 1), hidden.get(shard.stage)
        self._ends = None
        if device.type == "cuda" and last > 0:
            self._ends = _own_group([(rank, last * width + rank) for rank in range(width)], shard.rank)
        self._shard = shard
        self._device = device
        self._max_in_flight = max_in_flight
        self._sent: deque[tuple[distributed.Work, torch.Tensor]] = deque()
        self.progress = 0
        """Calls so far."""
        self._rows: PeerRows | None = None
        if device.type == "cuda":
            self._connect()
            if shape.tp > 1:
                # Triton is there on CUDA machines alone.
                from loraplex_kernels.gpu.lora import Site

                from loraplex.model_runner.ranks.peer_memory import make_peer_rows

                self._rows = make_peer_rows(
                    self._stage,
                    store,
                    f"stage {shard.stage}",
                    features=shard.model.hidden_size,
                    shrunk_features={Site.O: shard.local.q_size, Site.DOWN: shard.local.intermediate_size},
                    device=device,
                    dtype=dtype,
                )

    @property
    def rows(self) -> "PeerRows | None":
        return self._rows

    def _connect(self) -> None:
        """NCCL connects in its first calls, in which every rank waits for the others: better now than between steps."""
        shard, one = self._shard, torch.zeros(1, device=self._device)
        distributed.all_reduce(one, group=self._stage)
        if not shard.is_first:
            self.receive_hidden(one)
        if not shard.is_last:
            self.send_hidden(one)
        if self._ends is not None:
            if shard.is_last:
                self.send_tokens(one)
            elif shard.is_first:
                self.receive_tokens(one)
        torch.cuda.synchronize(self._device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.progress += 1
        if self._shard.shape.tp == 1:
            return x
        distributed.all_reduce(x, group=self._stage)
        return x

    def gather_logits(self, logits_BV: torch.Tensor, out_BV: torch.Tensor | None = None) -> torch.Tensor:
        shard = self._shard
        if shard.shape.tp > 1:
            padding = shard.vocabulary_share - logits_BV.shape[1]
            own_BV = functional.pad(logits_BV, (0, padding)) if padding else logits_BV.contiguous()
            parts = [torch.empty_like(own_BV) for _ in range(shard.shape.tp)]
            distributed.all_gather(parts, own_BV, group=self._stage)
            if out_BV is not None and out_BV.shape[1] == shard.vocabulary_share * shard.shape.tp:
                logits_BV = torch.cat(parts, dim=1, out=out_BV)
            else:
                logits_BV = torch.cat(parts, dim=1)[:, : shard.model.vocab_size]
        self.progress += 1
        return logits_BV if out_BV is None or out_BV is logits_BV else out_BV.copy_(logits_BV)

    def receive_hidden(self, out_TD: torch.Tensor) -> None:
        distributed.recv(out_TD, self._shard.rank - self._shard.shape.tp, group=self._from_before)
        self.progress += 1

    def send_hidden(self, residual_TD: torch.Tensor) -> None:
        self._send(residual_TD, self._shard.rank + self._shard.shape.tp, self._to_next)

    def send_tokens(self, tokens_B: torch.Tensor) -> None:
        self._send(tokens_B, self._shard.tp_rank, self._ends)

    def receive_tokens(self, out_B: torch.Tensor) -> None:
        shape = self._shard.shape
        distributed.recv(out_B, (shape.pp - 1) * shape.tp + self._shard.tp_rank, group=self._ends)
        self.progress += 1

    def _send(self, tensor: torch.Tensor, to_rank: int, group: distributed.ProcessGroup | None) -> None:
        # The tensor must live until it is sent; of steps that are not in flight any more it surely is.
        if len(self._sent) == self._max_in_flight:
            self._sent.popleft()[0].wait()
        work = distributed.isend(tensor, to_rank, group=group)
        assert work is not None, "the rank is not in its own group"
        self._sent.append((work, tensor))
        self.progress += 1


def _own_group(all_ranks: Sequence[Sequence[int]], rank: int) -> distributed.ProcessGroup | None:
    """The one that holds this rank, of groups that share none; None: none does. Every rank must take part in the making
    of every group."""
    groups = [distributed.new_group(list(ranks)) for ranks in all_ranks]
    return next((group for group, ranks in zip(groups, all_ranks, strict=True) if rank in ranks), None)


def _start_nccl(store: TCPStore, shard: Shard, device: torch.device) -> None:
    # Multicast over NVLink needs the whole host's consent, and gains little for a few GPUs.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    distributed.init_process_group(
        "nccl", store=store, rank=shard.rank, world_size=shard.shape.num_ranks, timeout=_TIMEOUT, device_id=device
    )


def _start_gloo(store: TCPStore, shard: Shard, host: str) -> None:
    # gloo would listen where this machine's name leads, which need not be where the other ranks reach it.
    interface = _interface_towards(host)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    distributed.init_process_group(
        "gloo", store=store, rank=shard.rank, world_size=shard.shape.num_ranks, timeout=_TIMEOUT
    )


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
