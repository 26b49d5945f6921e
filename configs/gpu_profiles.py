"""GPUs by name: memory, rates and links of a card, from the files in configs/gpus/ or from one of the user's own."""

import difflib
import os
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from configs.errors import InputError
from configs.loading import read_document
from configs.problems import explain_errors
from configs.section import PositiveFloat, PositiveInt, Section

FOLDER = Path(__file__).parent / "gpus"

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(gi?b?)?\s*", re.IGNORECASE)  # of memory; without GB perhaps a model


class GpuProfile(Section):
    """What a plan knows about a GPU. null: its maker does not say, or it has none."""

    name: Annotated[str, Field(pattern=r"^[^\r\n]+$", examples=["NVIDIA H100 80GB SXM5"])]
    """For people."""

    untested: Annotated[bool, Field(strict=True)]
    """Whether fluxfill has never run on this card: the figures are its maker's, and nothing was measured."""

    memory_gib: Annotated[PositiveFloat, Field(examples=[80])]
    """Memory of one GPU, in GiB. Its driver keeps up to 1 GiB of it."""

    capability: Annotated[str, Field(pattern=r"^\d+\.\d$", examples=["9.0"])] | None = None
    """CUDA's compute capability. null: no CUDA."""

    bf16_tflops: PositiveFloat | None = None
    """Dense bf16 matrix products with fp32 sums, in TFLOP/s."""

    fp8_tflops: PositiveFloat | None = None
    """Dense fp8 matrix products with fp32 sums, in TFLOP/s."""

    memory_bandwidth_gb_s: PositiveFloat | None = None
    """Of the GPU's own memory, in GB/s."""

    nvlink_gb_s: PositiveFloat | None = None
    """Of one GPU to the others of its node, both directions together, in GB/s. null: over PCIe."""

    nic_gbit_s: PositiveFloat | None = None
    """Of the network, one direction, for each GPU, in Gbit/s. null: the machine decides."""

    gpus_per_node: PositiveInt | None = None
    """GPUs in a node. null: the machine decides."""

    @property
    def is_amd(self) -> bool:
        """Whether it runs under ROCm. Without a capability alone may be a card whose driver did not tell it."""
        return self.capability is None and "nvidia" not in self.name.lower()


def gpu_names() -> list[str]:
    """The names of the profiles in configs/gpus/, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def own_folder() -> Path:
    """Where a user's own profiles lie: ~/.config/fluxfill/gpus, or under XDG_CONFIG_HOME where that is set."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "fluxfill", "gpus")


def profile_files() -> dict[str, Path]:
    """Name -> file of every profile, sorted: those of configs/gpus/, and the user's own, which go before them."""
    found = {path.stem: path for folder in (FOLDER, own_folder()) for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def load_gpu_profile(name: str) -> GpuProfile:
    """The profile of a name in configs/gpus/ or among the user's own (80GB, h100-80gb, "RTX 4090", any beginning that
    only one has), or of a YAML file.

    Raises InputError for a name that none or several have, and one that lists every problem of a file.
    """
    if is_profile_file(name):
        return read_profile(Path(name).expanduser())
    size = _SIZE.fullmatch(name)
    asked = f"{float(size[1]):g}{'gb' if size[2] else ''}" if size else _letters(name)
    part = re.compile(rf"(?<!\d){re.escape(asked)}(?!\d)" if size else re.escape(asked))  # 8GB is no part of 48GB
    files = profile_files()
    names = list(files)
    spelled = {known: known.lower() if size else _letters(known) for known in names if asked}
    matching = [known for known, text in spelled.items() if part.match(text)]
    exact = [known for known in matching if _letters(known) == asked]
    if len(exact or matching) == 1:
        return read_profile(files[(exact or matching)[0]])
    nearest = [known for known, text in spelled.items() if part.search(text)]
    if not nearest and size:
        nearest = _sizes_near(float(size[1]), names)
    elif not nearest:
        nearest = difflib.get_close_matches(asked, names, n=3, cutoff=0.4)
    found = "several GPUs have that name" if matching else "there is no such GPU"
    word = "Take one of" if matching else "Nearest" if nearest else "Known"
    raise InputError(
        f"{name or '(no name)'}: {found}. {word}: {', '.join(matching or nearest or names)}. For another card give a "
        f"YAML file of its own: `fluxfill gpus detect` writes one where the card is, or copy "
        f"{FOLDER / 'a100-80gb.yaml'}."
    )


def _sizes_near(gib: float, names: Iterable[str]) -> list[str]:
    """Those of the names that are sizes of memory, the nearest first."""
    sizes = [name for name in names if name.removesuffix("gb").isdecimal()]
    return sorted(sizes, key=lambda name: abs(int(name.removesuffix("gb")) - gib))


def is_profile_file(name: str) -> bool:
    """Whether a profile is named by its file."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def profile_of_card(name: str, memory_gib: float) -> GpuProfile:
    """The profile of a card by its driver's name for it, as NVIDIA H100 80GB HBM3, and by its memory, which it gets; of
    a card that has none, the plain one whose memory is nearest."""
    named = {known: read_profile(FOLDER / f"{known}.yaml") for known in gpu_names()}
    models = {known: known.rpartition("-")[0] for known in named}
    words = re.split(r"[^a-z0-9]+", name.lower())
    spelled = {*words, *("".join(pair) for pair in pairwise(words))}  # RTX 4090
    alike = [known for known, model in models.items() if model in spelled]
    nearest = min(
        alike or [known for known, model in models.items() if not model],
        key=lambda known: abs(named[known].memory_gib - memory_gib),
    )
    return named[nearest].model_copy(update={"memory_gib": memory_gib})


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_profile(path: Path) -> GpuProfile:
    """The profile in a YAML file. Raises InputError with a line for every problem."""
    document = read_document(path, "a GPU's profile, or a name that `fluxfill gpus list` shows")
    problems = [f"{path}:{line}: {text}." for line, text in document.problems]
    raw = document.value if isinstance(document.value, dict) else {}
    try:
        profile = GpuProfile.model_validate(raw)
    except ValidationError as error:
        schema = GpuProfile.model_json_schema(schema_generator=GenerateJsonSchema)
        problems += [
            f"{path}:{document.lines[key]}: {text}" if key in document.lines else f"{path}: {text}"
            for key, text in explain_errors(error, raw, schema)
        ]
    if problems:
        raise InputError("\n".join(problems))
    return profile
