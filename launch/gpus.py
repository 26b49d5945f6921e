"""The GPUs of this machine, asked for without torch, those of a cluster's nodes, and what each is for."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.data_schema import DataConfig
from configs.errors import InputError
from configs.gpu_profiles import GpuProfile, load_gpu_profile
from configs.schema import Config
from configs.slurm_schema import SlurmConfig


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


@dataclass(frozen=True)
class Gpu:
    """index: the driver's.  memory_gib: all of it; used_gib: what is taken now, by whomever.  capability: CUDA's
    compute capability, (9, 0) of an H100."""

    index: int
    name: str
    memory_gib: float
    used_gib: float
    driver: str
    capability: tuple[int, int]


_QUERY = "index,name,memory.total,memory.used,driver_version,compute_cap,uuid"


def list_gpus(environment: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that a process with these variables may use, in its own order: CUDA_VISIBLE_DEVICES by number or UUID,
    up to the first that is not there, as CUDA reads it. Empty where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in listing.splitlines()]
    installed = [(_gpu_of(row), row[6]) for row in rows if len(row) == 7]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [gpu for gpu, _ in installed]
    chosen = []
    for device in (device.strip() for device in visible.split(",")):
        match = [gpu for gpu, uuid in installed if device == str(gpu.index) or (device and uuid.startswith(device))]
        if not match:
            break
        chosen.append(match[0])
    return chosen


def _gpu_of(row: Sequence[str]) -> Gpu:
    index, name, total, used, driver, capability, _ = row

    def mib(text: str) -> float:  # "[N/A]" where a card shares the host's memory
        return float(text) if text.replace(".", "").isdigit() else 0.0

    major, _, minor = capability.partition(".")
    known = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
    return Gpu(int(index), name, mib(total) / 1024, mib(used) / 1024, driver, known)


def count_training_gpus(num_gpus: int, encoder_devices: Sequence[str] | None) -> int:
    """How many of a machine's GPUs are there for training processes, which take cuda:0 and those after it: all before
    the first that encodes (data.encoder_devices). If that is cuda:0 itself, all: it does both."""
    encoding = [int(device.removeprefix("cuda:")) for device in encoder_devices or [] if device != "cpu"]
    return min(num_gpus, min(encoding, default=0) or num_gpus)


def gpu_of_nodes(slurm: SlurmConfig) -> GpuProfile | None:
    """The profile slurm.gpu. Raises InputError where there is none of its name."""
    if slurm.gpu is None:
        return None
    try:
        return load_gpu_profile(slurm.gpu)
    except InputError as error:
        raise InputError(f"slurm.gpu: {error}") from error


def gpus_of_a_node(slurm: SlurmConfig) -> int | None:
    """slurm.gpus_per_node, else what the profile slurm.gpu says; None: neither does. Raises as `gpu_of_nodes` does."""
    profile = gpu_of_nodes(slurm)
    return slurm.gpus_per_node or (None if profile is None else profile.gpus_per_node)


def idle_gpus(config: Config, training_gpus: int) -> str | None:
    """That some of a run's GPUs would have nothing to train on; None: each has a sample in every step."""
    samples = config.train.global_batch_size
    if samples >= training_gpus:
        return None
    return f"Only {samples} of {training_gpus} GPUs have a sample in a step: raise train.global_batch_size"


def refuse_missing_gpus(data: DataConfig, num_gpus: int) -> None:
    """Raises InputError if an online run would encode on a GPU that a machine with so many does not have; of 0 there is
    nothing known."""
    named = {"data.encoder_devices": data.encoder_devices or []}
    if data.mode == "online":
        named |= {f"data.encoders.{name}": [device] for name, device in data.encoders if "precision" not in name}
    for key, devices in named.items():
        for device in devices:
            if num_gpus and device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= num_gpus:
                there = "cuda:0 is the only GPU" if num_gpus == 1 else f"there are {num_gpus} GPUs, from cuda:0 on"
                more = int(device.removeprefix("cuda:")) + 1
                raise InputError(
                    f"{key} names {device}, but on a machine of this run {there}. Name one of those, leave the key out "
                    f"to encode on the GPUs that train, or take machines of {more} (slurm.gpus_per_node={more})."
                )
