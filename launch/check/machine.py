"""GPUs, their driver and torch's build for them, against the processes that would be started."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

from launch.check.result import Check, ok
from launch.check.situation import Situation
from launch.gpus import Gpu, gpus_of_a_node

_MUCH_USED = 0.1  # of a GPU's memory, before the run has begun
_BF16_CAPABILITY = (8, 0)
_ASK_TORCH = (
    "import json, torch\n"
    "count = torch.cuda.device_count() if torch.cuda.is_available() else 0\n"
    "print(json.dumps([torch.__version__, torch.version.cuda or torch.version.hip, count]))\n"
)


def check_gpus(gpus: Sequence[Gpu]) -> Iterator[Check]:
    """The GPUs of this machine, and whether torch can use them."""
    if not gpus:
        yield ok("gpus", "none: no NVIDIA driver answers, or CUDA_VISIBLE_DEVICES leaves none")
        return
    kinds = sorted({(gpu.name, round(gpu.memory_gib)) for gpu in gpus})
    named = ", ".join(
        f"{sum(gpu.name == name and round(gpu.memory_gib) == gib for gpu in gpus)} x {name} with {gib} GiB"
        for name, gib in kinds
    )
    yield ok("gpus", f"{named}, driver {gpus[0].driver}")
    for gpu in gpus:
        if gpu.used_gib > _MUCH_USED * gpu.memory_gib:
            what = f"GPU {gpu.index}: {gpu.used_gib:.1f} of its {gpu.memory_gib:.1f} GiB are in use already"
            yield Check("gpus", "warning", what, "End what runs there (`nvidia-smi` lists it), or leave the GPU out.")
    yield check_torch(len(gpus))


def check_torch(num_gpus: int, python: str = sys.executable, timeout_seconds: float = 300) -> Check:
    """Whether torch sees the GPUs that the driver has, asked in a process of its own."""
    command = [python, "-P", "-c", _ASK_TORCH]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        what = f"torch did not answer within {timeout_seconds:g} s"
        cure = "Look at `nvidia-smi` and `dmesg`: the driver hangs, or the disk that torch is read from."
        return Check("torch", "error", what, cure)
    try:
        version, build, seen = json.loads(asked.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (asked.stderr.splitlines() or ["no message"])[-1]
        return Check("torch", "error", f"torch cannot be imported ({last})", "Install it again: make install")
    if build is None:
        cure = "Install torch's build for CUDA in its place."
        return Check("torch", "error", f"torch {version} is built for CPUs, and {num_gpus} GPU(s) are here", cure)
    if seen < num_gpus:
        what = f"torch {version} for CUDA {build} sees {seen} of {num_gpus} GPU(s)"
        return Check("torch", "error", what, f"Update the driver to one for CUDA {build}, or install an older build.")
    return ok("torch", f"torch {version} for CUDA {build} sees {seen} GPU(s)")


def check_processes(situation: Situation) -> Iterator[Check]:
    """The processes against GPUs and global batch; the numbers that these GPUs compute with."""
    config, gpus, count = situation.config, situation.gpus, situation.processes
    if gpus and count > len(gpus):
        what = f"{count} processes, and {len(gpus)} GPU(s)"
        yield Check("processes", "error", what, f"Give --num-processes {len(gpus)}: each process needs its own GPU.")
    elif config.train.global_batch_size < count:
        what = f"train.global_batch_size {config.train.global_batch_size} leaves some of {count} processes idle"
        yield Check("processes", "warning", what, f"Raise it to a multiple of {count}, or give --num-processes.")
    else:
        each, rest = divmod(config.train.global_batch_size, count)
        share = f"{each} or {each + 1}" if rest else str(each)
        yield ok("processes", f"{count}, each with {share} of {config.train.global_batch_size} samples an update")
    yield from _check_encoding_gpus(situation)
    old = [gpu for gpu in gpus if (0, 0) < gpu.capability < _BF16_CAPABILITY]
    if old and config.model.precision != "fp32":
        what = f"{old[0].name} computes bf16 in software, many times slower"
        yield Check("processes", "warning", what, "Train on a GPU of the Ampere generation or newer.")


def _check_encoding_gpus(situation: Situation) -> Iterator[Check]:
    """Where nobody says how many GPUs a machine has: those that encode are right behind those that train."""
    config = situation.config
    named = sorted({device for device in config.data.encoder_devices or [] if device != "cpu"})
    if situation.gpus or gpus_of_a_node(config.slurm) or not named:
        return
    gpus = situation.processes + len(named)
    if last := [device for device in named if int(device.removeprefix("cuda:")) >= gpus]:
        what = (
            f"data.encoder_devices names {last[0]}, but {situation.processes} that train and {len(named)} that encode"
        )
        cure = (
            f"Name the first that does not train, cuda:{situation.processes}, or give --num-processes; where there are"
        )
        yield Check("processes", "warning", f"{what} are {gpus} GPUs", f"{cure} more GPUs, set slurm.gpus_per_node.")
