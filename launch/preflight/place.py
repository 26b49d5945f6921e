"""Which node of how many this process stands for: in a step of SLURM's, under `accelerate launch`, or alone."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from data.preprocessing.worker import is_batch_script
from launch.gpus import count_gpus, count_training_gpus
from launch.slurm.allocation import choose_port
from launch.slurm.controller import node_names

# What a job's script gives to the nodes of its preflight, by which they know each other; without it all who come are
# taken for nodes.
TOKEN = "FLUXFILL_PREFLIGHT_TOKEN"


@dataclass(frozen=True)
class Place:
    """rank: of count nodes, the head's is 0.  processes: ranks of the run on each node.  head, port: where the head
    listens.  names: of all nodes, as far as they are known from here.  asked_gpus: of each node; 0: none.
    token: of the job."""

    rank: int
    count: int
    processes: int
    head: str
    port: int
    names: tuple[str, ...]
    asked_gpus: int = 0
    token: str = field(default="", repr=False)

    def name(self, rank: int) -> str:
        return self.names[rank] if rank < len(self.names) else f"node {rank}"


def own_name() -> str:
    """This node's name, by which SLURM can exclude it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def find_place(environ: Mapping[str, str], encoder_devices: list[str] | None) -> Place | None:
    """The place of a process with these variables; None: another process of its node stands for it."""
    token = environ.get(TOKEN, "")
    if "LOCAL_RANK" in environ and "MASTER_ADDR" in environ:  # torch's launcher
        if environ["LOCAL_RANK"] != "0":
            return None
        processes = int(environ["LOCAL_WORLD_SIZE"])
        count = int(environ["WORLD_SIZE"]) // processes
        # The launcher itself listens at its port; of one node any is free.
        port = int(environ["MASTER_PORT"]) + 1 if count > 1 else 0
        return Place(int(environ["RANK"]) // processes, count, processes, environ["MASTER_ADDR"], port, (), token=token)
    gpus = count_gpus(environ)
    processes = max(count_training_gpus(gpus, encoder_devices), 1)
    if "SLURM_STEP_NODELIST" in environ and not is_batch_script():
        names = tuple(node_names(environ["SLURM_STEP_NODELIST"]))
        port = choose_port(environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT", "0")))
        asked = int(environ.get("SLURM_GPUS_ON_NODE", "0"))
        return Place(int(environ["SLURM_NODEID"]), len(names), processes, names[0], port, names, asked, token)
    return Place(0, 1, processes, "127.0.0.1", 0, (own_name(),))
