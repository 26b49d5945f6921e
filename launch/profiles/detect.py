"""A GPU profile of the machine at hand: what its driver and Linux tell, and of a known card also its maker's rates."""

import re
from collections.abc import Mapping
from pathlib import Path

from configs.errors import InputError
from configs.gpu_profiles import FOLDER, GpuProfile, gpu_names, load_gpu_profile
from configs.yaml_text import dump_inline
from launch.gpus import Gpu, list_gpus
from launch.profiles.links import network_ports, nvlink_rates

_RATES = ("bf16_tflops", "fp8_tflops", "memory_bandwidth_gb_s")
_SAME_MEMORY = 0.1  # of a data sheet's, which a card of the same name may miss: its driver keeps some
# Words of a card's name that do not tell it from another; PCIe, NVL, Ti, Laptop, Ada and such do.
_PLAIN_WORDS = re.compile(r"nvidia|geforce|amd|instinct|gpu|gb|\d+gb|sxm\d*|hbm\d\w*")


def render_profile(environment: Mapping[str, str], system: Path = Path("/sys")) -> str:
    """The profile, as YAML with where each figure comes from. A rate that is not known is null.

    environment: with CUDA_VISIBLE_DEVICES the GPUs are those it names.  system: where sysfs is mounted.  Raises
    InputError where there is no GPU, are several kinds, or the driver does not tell the memory.
    """
    gpus = list_gpus(environment)
    if not gpus:
        raise InputError(
            "No GPU is here: nvidia-smi lists none. Run it where the GPUs are, such as in a job; on a SLURM cluster "
            "`srun --gpus-per-node=8 fluxfill gpus detect`. Other makers' cards are not looked for: copy "
            f"{FOLDER / 'mi300x-192gb.yaml'}."
        )
    gpu = gpus[0]
    if others := sorted({other.name for other in gpus} - {gpu.name}):
        raise InputError(
            f"GPUs of several kinds are here: {', '.join([gpu.name, *others])}. A profile is of one: name its GPUs in "
            "CUDA_VISIBLE_DEVICES."
        )
    if not gpu.memory_gib:
        raise InputError(
            f"{gpu.name} shares the host's memory, and its driver tells no size: write its profile by hand."
        )
    name, known = _known_card(gpu)
    figures: list[tuple[str, object, str]] = [
        ("memory_gib", round(gpu.memory_gib, 1), "nvidia-smi"),
        ("capability", _capability(gpu), "nvidia-smi"),
        *(_rate(key, name, known) for key in _RATES),
        _nvlink(gpu, name, known),
        _nic(len(gpus), system),
        ("gpus_per_node", len(gpus), "nvidia-smi"),
    ]
    lines = ["# Written by `fluxfill gpus detect`.", f"name: {dump_inline(gpu.name)}", "untested: true"]
    for key, value, source in figures:
        text = f"{value:g}" if isinstance(value, float) else dump_inline(value)
        lines.append(f"{key}: {text} # {source}")
    return "\n".join(lines) + "\n"


def missing_rates(text: str) -> list[str]:
    """The keys of a rendered profile that a plan needs and that are null."""
    return [key for key in ("bf16_tflops", "memory_bandwidth_gb_s") if re.search(f"^{key}: null", text, re.MULTILINE)]


def _known_card(gpu: Gpu) -> tuple[str | None, GpuProfile | None]:
    """(name of the nearest profile, that profile where it is of this very card).

    Nearest: all words of its name are in the driver's, and its memory is the most alike. An H100 PCIe is not the H100
    SXM5 that is known, whose name has nothing more than H100.
    """
    words = _words(gpu.name)
    near = []
    for name in gpu_names():
        profile = load_gpu_profile(str(FOLDER / f"{name}.yaml"))
        if (model := _words(profile.name)) and model <= words:
            difference = abs(profile.memory_gib - gpu.memory_gib) / profile.memory_gib
            near.append((-len(model), difference, name, profile))
    if not near:
        return None, None
    _, difference, name, profile = min(near, key=lambda candidate: candidate[:3])
    is_same = _words(profile.name) == words and difference <= _SAME_MEMORY
    return name, profile if is_same else None


def _words(name: str) -> set[str]:
    """("NVIDIA A100-SXM4-80GB") -> {"a100"}."""
    return {word for word in re.findall(r"[a-z0-9]+", name.lower()) if not _PLAIN_WORDS.fullmatch(word)}


def _capability(gpu: Gpu) -> str | None:
    major, minor = gpu.capability
    return f"{major}.{minor}" if major else None


def _rate(key: str, name: str | None, known: GpuProfile | None) -> tuple[str, object, str]:
    if known is not None:
        return key, getattr(known, key), f"as in {name}.yaml, which says where from"
    nearest = getattr(load_gpu_profile(name), key) if name else None
    near = "" if nearest is None else f"; {name}, the card of the nearest name, has {nearest:g}"
    return key, None, f"fill in from its maker's data sheet, without sparsity{near}"


def _nvlink(gpu: Gpu, name: str | None, known: GpuProfile | None) -> tuple[str, object, str]:
    """Both directions together. The driver's rates are those of the wires: of the maker's figure and theirs the lower,
    which is the driver's where links are down."""
    rates = nvlink_rates(gpu.index)
    if not rates:
        return "nvlink_gb_s", None, "nvidia-smi: no active link"
    both = 2 * sum(rates)
    source = f"nvidia-smi: {len(rates)} links of {rates[0]:g} GB/s each way"
    if known is not None and known.nvlink_gb_s is not None and known.nvlink_gb_s <= both:
        return "nvlink_gb_s", known.nvlink_gb_s, f"as in {name}.yaml; {source}"
    return "nvlink_gb_s", round(both, 1), source


def _nic(gpus: int, system: Path) -> tuple[str, object, str]:
    ports = network_ports(system)
    if ports is None:
        return "nic_gbit_s", None, "no port that is up tells its rate"
    source = f"{ports.count} x {ports.gbit_s:g} Gbit/s of {ports.kind} for {gpus} GPUs"
    return "nic_gbit_s", round(ports.for_each(gpus), 1), source
