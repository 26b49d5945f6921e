"""The environment of the tests' own process."""

import logging
import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

# By which a machine would change what a test sees: colours and widths of what is printed, a launch or a job that this
# process is none of, a proxy that the servers of tests are not behind, a hub, buckets and accounts of its user.
_FOREIGN = re.compile(
    r"FORCE_COLOR|CLICOLOR_FORCE|NO_COLOR|TTY_\w+|COLUMNS|LINES"
    r"|(SLURM|SLURMD|SBATCH|FLUXFILL|ACCELERATE|TORCHELASTIC|PET|FSDP|AWS|GOOGLE|WANDB)_\w+"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    r"|HF_(HUB_OFFLINE|ENDPOINT|TOKEN)|(?i:(https?|all|no)_proxy)"
)
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def forget_the_machine(environment: MutableMapping[str, str]) -> None:
    """Takes out of it what makes a test depend on who runs it, and where."""
    for name in filter(_FOREIGN.fullmatch, [*environment]):
        del environment[name]
    environment["OMP_NUM_THREADS"] = "1"  # what two processes compute is compared to the bit; a test starts several


def hide_gpus(environment: MutableMapping[str, str]) -> None:
    """Of a machine that has some: the tests' figures, and what they are told of devices, are a CPU's."""
    if any(Path(device).exists() for device in _GPU_DEVICES):
        environment["CUDA_VISIBLE_DEVICES"] = environment["HIP_VISIBLE_DEVICES"] = ""


@contextmanager
def environment_of_before() -> Iterator[None]:
    """Restores os.environ, and fluxfill's logger, which a program that was run in this process leaves with its own
    handlers. accelerate and DeepSpeed leave variables by which a later test's programs would take this process for
    their launcher, and wait for its end."""
    before, logger = dict(os.environ), logging.getLogger("fluxfill")
    level, propagates, handlers = logger.level, logger.propagate, [*logger.handlers]
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagates
        logger.handlers[:] = handlers
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
