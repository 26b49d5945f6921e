"""The host memory that a run takes on a node by formula, against what the node lets it have."""

import math
import os
from collections.abc import Iterator, Sequence

from configs.cgroup import memory_limits
from configs.host_memory import host_memory
from configs.memory import GIB, Part
from configs.schema import Config
from configs.this_machine import memory_bytes
from launch.check.model import Sizes
from launch.check.result import Check, ok


def check_host_memory(
    config: Config, sizes: Sizes, engine: str, *, node: int, nodes: int, processes: int
) -> Iterator[Check]:
    """Host memory that a plan counts for the node, against its limit: an error where it does not do, a warning where
    saves will do without their copies.  processes: of each node."""
    where = {"nodes": nodes, "gpus_per_node": processes, "text_parameters": sizes.text, "vae_parameters": sizes.vae}
    parts = host_memory(config, sizes.shape, engine, **where, is_first=node == 0)
    waits = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"asynchronous": False})})
    without_copies = host_memory(waits, sizes.shape, engine, **where, is_first=node == 0)
    limit = host_limit()
    more = "Ask for more by slurm.memory_per_node (0: all of a node's), or for more nodes"
    if _bytes(without_copies) > limit:
        what = f"{_told(without_copies, limit)} that this node lets the job have"
        yield Check("host memory", "error", what, f"{more}.")
    elif _bytes(parts) > limit:
        what = f"{_told(parts, limit)}: saves whose copies do not fit are written while training waits"
        yield Check("host memory", "warning", what, f"{more}, if saves are to be asynchronous.")
    else:
        yield ok("host memory", _told(parts, limit))


def _bytes(parts: Sequence[Part]) -> float:
    return sum(part.bytes for part in parts)


def _told(parts: Sequence[Part], limit: float) -> str:
    return f"{_bytes(parts) / GIB:.1f} GiB for {' and '.join(part.what for part in parts)}, of {limit / GIB:.1f}"


def host_limit() -> float:
    """Bytes of memory that this process may have: the machine's, or less by its cgroup or SLURM."""
    limits = [float(memory_bytes() or math.inf)]
    if mib := os.environ.get("SLURM_MEM_PER_NODE", "").removesuffix("M"):
        limits += [int(mib) * 2.0**20] if mib.isdigit() and mib != "0" else []
    limits += memory_limits()
    return min(limits)
