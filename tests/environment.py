"""The tests' own process: its environment, and what it remembers."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from trainer.process import launcher, run_owner, starts, stop_signals

# Modules in which a process of a run notes what it is, and how far it has come.
NOTING = (launcher, run_owner, starts, stop_signals)

# By which a machine would change what a test sees: colours and widths of what is printed, a launch or a job that this
# process is none of, a proxy that the servers of tests are not behind, a hub, buckets and accounts of its user.
_FOREIGN = re.compile(
    r"FORCE_COLOR|CLICOLOR_FORCE|NO_COLOR|TTY_\w+|COLUMNS|LINES|LOGLEVEL|XDG_CONFIG_HOME"
    r"|(SLURM|SLURMD|SBATCH|FLUXFILL|ACCELERATE|TORCHELASTIC|PET|FSDP|AWS|GOOGLE|WANDB)_\w+"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    r"|HF_(HUB_OFFLINE|ENDPOINT|TOKEN)|HUGGING_FACE_HUB_TOKEN|(?i:(https?|all|no)_proxy)"
)
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def forget_the_machine(environment: MutableMapping[str, str]) -> None:
    """Takes out of it what makes a test depend on who runs it, and where."""
    for name in filter(_FOREIGN.fullmatch, [*environment]):
        del environment[name]
    environment["OMP_NUM_THREADS"] = "1"  # what two processes compute is compared to the bit; a test starts several


def hide_gpus(environment: MutableMapping[str, str]) -> None:
    """Of a machine that has some: the tests' figures, and what they are told of devices, are a CPU's."""
    if any(Path(device).exists() for device in _GPU_DEVICES):
        environment.update(dict.fromkeys(_VISIBLE, ""))


def with_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """The same for a process that sees the GPUs that are hidden from this one."""
    return {name: value for name, value in environment.items() if name not in _VISIBLE}


@contextmanager
def process_of_before() -> Iterator[None]:
    """Undoes what a program that a test runs in this process leaves in it, for the tests after it on the same worker:
    that it trains, the handlers of fluxfill's logger, and variables of accelerate and DeepSpeed by which a later test's
    programs would take this process for their launcher, and wait for its end."""
    variables, logger = dict(os.environ), logging.getLogger("fluxfill")
    level, propagates, handlers = logger.level, logger.propagate, [*logger.handlers]
    noted = [dict(vars(module)) for module in NOTING]
    try:
        yield
    finally:
        for module, before in zip(NOTING, noted, strict=True):
            vars(module).update(before)
        logger.setLevel(level)
        logger.propagate = propagates
        logger.handlers[:] = handlers
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
