"""The GPUs of this machine, asked for without torch."""

import subprocess
from collections.abc import Mapping


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
