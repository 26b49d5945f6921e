"""The processes of a run, and what they send each other between steps."""

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import distributed_c10d

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; the methods are torch's collectives, of one process none.

    All ranks call a method together.  device: where tensors are sent from, and arrive.
    """

    rank: int
    world_size: int
    device: torch.device

    def all_gather(self, item: Any) -> list:
        """Every rank's item, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def start_all_gather(self, value: float) -> Tensor:
        """[world_size] on the device, where every rank's number is once the device comes there: the host goes on."""
        own = torch.full((1,), value, device=self.device)
        if self.world_size == 1:
            return own
        every = torch.empty(self.world_size, device=self.device)
        dist.all_gather_into_tensor(every, own)
        return every

    def gather(self, item: Any) -> list | None:
        """Every rank's item, in rank order, on rank 0; None elsewhere. For what is large: the others need no room."""
        if self.world_size == 1:
            return [item]
        items: list | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(item, items)
        return items

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0's item on every rank."""
        items = [item]
        if self.world_size > 1:
            dist.broadcast_object_list(items, device=self.device)
        return items[0]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank's device. Elsewhere `tensor` tells shape and dtype and may be on meta."""
        if self.rank == 0:
            value = tensor.detach().to(self.device).contiguous()
        else:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        if self.world_size > 1:
            dist.broadcast(value, src=0)
        return value

    def all_reduce_sum(self, value: float) -> float:
        """The sum of every rank's number, on every rank."""
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        self.all_reduce_sum_(total)
        return total.item()

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """Make `tensor` the sum of every rank's. Never a maximum: gloo's may lose a NaN, a sum never does."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def wait_for_ranks(patience: timedelta) -> None:
    """Have every process group of this rank wait so long for the others, whoever made it: meshes and DeepSpeed make
    groups of their own, which under NCCL wait 10 minutes.

    Calls private parts of torch. Where a version has them no more, the groups keep their own patience.
    """
    try:
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(patience, group)
    except AttributeError:
        log.warning("torch %s has no such timeouts: ranks may wait no longer than 10 minutes", torch.__version__)
