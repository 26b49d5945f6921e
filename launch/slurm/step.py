"""The command line of a job's step: `srun`, one task on each node, in a container or not."""

import os
import re
from collections.abc import Sequence

from configs.errors import InputError
from configs.slurm_schema import ContainerConfig, SlurmConfig
from launch.slurm.allocation import Allocation


def render_step(
    allocation: Allocation, container: ContainerConfig | None, python: str, folder: str, module: Sequence[str]
) -> list[str]:
    """`srun ... python -P -m MODULE ...` as an argument list.

    python: the interpreter outside a container.  folder: where the job was submitted from.  module: what Python runs,
    with its arguments.

    What srun would take over from a site's defaults or leave out is given: its tasks get the variables of this process
    and all cores; and when one ends the others are not killed, as they may still save.

    Raises InputError for a folder that cannot be mounted into a container.
    """
    line = ["srun", "--export=ALL", f"--nodes={allocation.num_nodes}", f"--ntasks={allocation.num_nodes}"]
    line += ["--ntasks-per-node=1", f"--cpus-per-task={allocation.cpus_per_node}"]
    if allocation.gpus_per_node:
        line += [f"--gpus-per-node={allocation.gpus_per_node}"]
    line += ["--mpi=none", "--input=none", "--kill-on-bad-exit=0", "--wait=0"]
    if container is not None and (separator := re.search("[,:]", folder)):
        raise InputError(
            f"{folder} has {separator[0]!r} in its name, which separates the mounts of slurm.container: submit the job "
            "from another folder."
        )
    if container is not None and container.runtime == "pyxis":
        mounts = ",".join([f"{folder}:{folder}", *container.mounts])
        line += [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        line += [f"--container-workdir={folder}"]
    if container is not None and container.runtime == "apptainer":
        line += ["apptainer", "exec", "--nv", "--bind", ",".join([folder, *container.mounts]), "--pwd", folder]
        line += [container.image]
    return [*line, python if container is None else container.python, "-P", "-m", *module]


def render_step_environment(slurm: SlurmConfig) -> dict[str, str]:
    """The variables of a step, on top of the job's. Jobs do not ask the hub for anything: compute nodes often cannot
    reach it, and what one of a thousand ranks fetched would be waited for by all."""
    variables = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    if slurm.interface is not None:
        variables |= {"NCCL_SOCKET_IFNAME": f"={slurm.interface}", "GLOO_SOCKET_IFNAME": slurm.interface}
    return variables | slurm.env
