"""What SLURM gave a job, from the variables of its batch script, and where its nodes meet."""

import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from configs.errors import InputError
from launch.slurm.controller import node_names

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's address
_PORTS = range(10_000, 30_000)  # below those that systems hand out for themselves


@dataclass(frozen=True)
class Allocation:
    """number: SLURM_JOB_ID.  gpus_per_node and cpus_per_node: 0 and 1 where the job asked for none."""

    number: str
    num_nodes: int
    gpus_per_node: int
    cpus_per_node: int
    nodelist: str


def read_allocation(environ: Mapping[str, str]) -> Allocation:
    """The allocation of the batch script with these variables. Raises InputError outside of one, and if its nodes have
    different numbers of GPUs, of which `accelerate launch` would leave some out without a word."""
    try:
        number, nodes = environ["SLURM_JOB_ID"], int(environ["SLURM_JOB_NUM_NODES"])
        nodelist = environ["SLURM_JOB_NODELIST"]
    except KeyError as missing:
        raise InputError(
            f"{missing.args[0]} is not set: this is no SLURM job. Start it by `sbatch slurm/train.sbatch` or `fluxfill "
            "slurm submit`."
        ) from missing
    # Beside a number per node it adds nothing, or is that of an outer salloc, which sbatch hands on.
    if "SLURM_GPUS" in environ and "SLURM_GPUS_PER_NODE" not in environ:
        raise InputError(
            "the job was submitted with --gpus, by which nodes may get different numbers of GPUs. Give --gpus-per-node."
        )
    return Allocation(
        number=number,
        num_nodes=nodes,
        gpus_per_node=int(environ.get("SLURM_GPUS_ON_NODE", "0")),
        cpus_per_node=int(environ.get("SLURM_CPUS_PER_TASK", "1")),
        nodelist=nodelist,
    )


def choose_port(number: str, restarts: int) -> int:
    """Where the processes of a job meet: another port for each job and each of its starts, the same on every node."""
    return _PORTS[(int(number) + 1009 * restarts) % len(_PORTS)]


def head_address(allocation: Allocation, interface: str | None) -> str:
    """The address of this node, the job's first, at which the others reach it.

    interface: its address is taken; None: that of the interface which leads to the job's last node. Raises InputError
    if there is none. Never localhost unless it was named: each node would then train alone.
    """
    if allocation.num_nodes == 1:
        return "127.0.0.1"
    if interface is not None:
        return interface_address(interface)
    advice = "Set slurm.interface to the network interface by which the nodes reach each other (`ip -br addr`)."
    here = socket.gethostname()
    other = node_names(allocation.nodelist)[-1]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, _PORTS[0]))  # sends nothing: it chooses the way
            address = probe.getsockname()[0]
    except OSError as error:
        raise InputError(f"{here} does not reach the job's node {other} by its name ({error}). {advice}") from error
    if ip_address(address).is_loopback:
        raise InputError(f"{here} takes the job's node {other} for itself ({address}). {advice}")
    return str(address)


def interface_address(interface: str) -> str:
    """The IPv4 address of a network interface of this machine. Raises InputError if it has none."""
    import fcntl  # here: the rest can be imported on Windows

    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise InputError(
                f"slurm.interface is {interface}, which has no address on {socket.gethostname()} ({error.strerror}). "
                f"Interfaces there: {known}."
            ) from error
    return socket.inet_ntoa(answer[20:24])
