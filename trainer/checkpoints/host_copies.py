"""Copies of the state in the nodes' host memory, from which asynchronous saves are written."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from configs.memory import GIB
from configs.this_machine import available_memory_bytes
from trainer.engines.base import Engine

_USABLE = 0.9  # of what is free: the pages of the file that is written are in memory for a while, too
_KEPT = 0.25  # of what is free, at the most: the rest is for readers, and for what else the node does


class HostCopies:
    """One rank's copies. Their memory is kept for the next save where that is a small part of what the node has free:
    a copy into new memory takes several times as long, and training waits for it. All ranks call the methods together.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: dict[str, Tensor] = {}
        self._share = 0.0  # the largest of any node

    def shortage(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why the copies of all ranks do not fit their nodes' memory, in words; None if they do. All ranks find the
        same."""
        engine = self._engine
        needed: dict[int, int] = defaultdict(int)
        kept: dict[int, int] = defaultdict(int)
        free: dict[int, float] = defaultdict(lambda: float("inf"))
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        own_kept = sum(copy.nbytes for copy in self._kept.values())
        available = available_memory_bytes()
        own = (engine.rank - engine.local_rank, num_bytes, own_kept, float("inf") if available is None else available)
        for first_rank, copy, of_before, left in engine.ranks.all_gather(own):
            needed[first_rank] += copy
            kept[first_rank] += of_before
            free[first_rank] = min(free[first_rank], left)
        for node in free:
            free[node] += kept[node]
        shares = {node: needed[node] / max(free[node], 1) for node in sorted(needed)}
        self._share = max(shares.values())
        short = [node for node, share in shares.items() if share > _USABLE]
        if not short:
            return None
        self._kept = {}
        node = short[0]
        found = f"its copy takes {needed[node] / GIB:.1f} GiB of host memory, {free[node] / GIB:.1f} are free"
        more = f", and {len(short) - 1} more have too little" if short[1:] else ""
        return f"{found} on the node of rank {node}{more}"

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The copies, for which `shortage` found room; good until the next call, which may overwrite them."""
        copies = {
            name: self._kept[name].copy_(tensor) if self._fits(name, tensor) else tensor.to("cpu", copy=True)
            for name, tensor in tensors.items()
        }
        self._kept = copies if self._share <= _KEPT else {}
        return copies

    def _fits(self, name: str, tensor: Tensor) -> bool:
        kept = self._kept.get(name)
        return kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype
