"""The GPUs of this machine, asked for without torch."""

import subprocess
from collections.abc import Mapping, Sequence


def count_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that a process with these variables may use: those CUDA_VISIBLE_DEVICES names, else all that the driver has.

    0 where there is no driver.
    """
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    installed = sum(line.startswith("GPU ") for line in listing.splitlines())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    named = [device.strip() for device in visible.split(",")]
    return min(installed, len([device for device in named if device not in ("", "-1")]))


def count_training_gpus(num_gpus: int, encoder_devices: Sequence[str] | None) -> int:
    """How many of a machine's GPUs are there for training processes, which take cuda:0 and those after it: all before
    the first that encodes (data.encoder_devices). If that is cuda:0 itself, all: it does both."""
    encoding = [int(device.removeprefix("cuda:")) for device in encoder_devices or [] if device != "cpu"]
    return min(num_gpus, min(encoding, default=0) or num_gpus)
