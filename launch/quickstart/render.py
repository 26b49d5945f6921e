"""The text of every file of a quickstart folder, from the choices for its GPUs."""

import json
import re
import shlex
from pathlib import Path

import jinja2

from configs.slurm_schema import SlurmConfig
from launch.command import REPO_ROOT
from launch.quickstart.choices import Choices
from launch.quickstart.seed_names import render_seed_names
from launch.slurm.render import for_preprocessing, site_directives

CONFIG = "train_flux_inpainting.yaml"
EXECUTABLE = frozenset({"migrate_your_data.py", "start_training.sh"})
_CRLF = frozenset({"start_training.bat"})
_FILES = (
    CONFIG,
    "migrate_your_data.py",
    "start_training.sh",
    "start_training.bat",
    "engine.yaml",
    "preprocess.sbatch",
    "train.sbatch",
    "README.md",
)


def render_files(
    choices: Choices, *, gpu_name: str, folder: Path, model: str, python: str, slurm: SlurmConfig
) -> dict[str, str]:
    """Name -> text, of all files.

    gpu_name: of the profile, or its file, absolute.  folder: where they will lie, absolute.  model: a hub id, or an
    absolute folder.  python: the interpreter that fluxfill is installed in.  slurm: what the batch scripts ask for
    and load, beside nodes and GPUs of training.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # scripts, not pages: what is put in is quoted by the filters below
    )
    templates.filters |= {"shell": shlex.quote, "yaml": _yaml_text, "repr": repr}
    own = slurm.preprocess
    values = {
        **vars(choices),
        "gpu_name": gpu_name,
        "folder": str(folder),
        "model": model,
        "model_is_folder": Path(model).is_absolute(),
        "python": python,
        "machines": _machines(choices),
        "summary": _summary(choices),
        "training_devices": "cuda:0" if choices.num_training == 1 else f"cuda:0 to cuda:{choices.num_training - 1}",
        "memory_count": _memory_count(choices),
        "batch_reason": _batch_reason(choices),
        "engine_text": (REPO_ROOT / "configs" / "engines" / f"{choices.engine}.yaml")
        .read_text(encoding="utf-8")
        .rstrip(),
        "seed_table": render_seed_names("en"),
        # Pictures are encoded by all GPUs of the run in one job, unless slurm.preprocess says otherwise.
        "tasks": own.tasks if "tasks" in own.model_fields_set else None,
        "encoding_gpus": own.gpus_per_node if own.model_fields_set & {"tasks", "gpus_per_node"} else choices.num_gpus,
    }
    texts = {}
    for name in _FILES:
        asked = for_preprocessing(slurm) if name == "preprocess.sbatch" else slurm
        site = site_directives(asked)
        venv = f"{slurm.venv}/bin/python" if slurm.venv is not None and name.endswith(".sbatch") else None
        texts[name] = templates.get_template(f"{name}.j2").render(values, slurm=asked, site=site, venv=venv)
    return {name: text.replace("\n", "\r\n") if name in _CRLF else text for name, text in texts.items()}


def _yaml_text(text: str) -> str:
    """A YAML scalar that is read back as this text: a JSON string is one."""
    return text if re.fullmatch(r"[A-Za-z0-9._-]*/[A-Za-z0-9/._-]+", text) else json.dumps(text, ensure_ascii=False)


def _machines(choices: Choices) -> str:
    gpus = f"{choices.num_gpus} x {choices.gpu.name}"
    return gpus if choices.num_nodes == 1 else f"{choices.num_nodes} nodes of {gpus}"


def _summary(choices: Choices) -> str:
    trains = "one GPU trains" if choices.num_training == 1 else f"{choices.num_training} GPUs train"
    where = " on each node" if choices.num_nodes > 1 else ""
    if not choices.online:
        return f"Pictures are encoded once, to disk; then {trains}{where}, and no encoder takes memory."
    if not choices.encoder_devices:
        return f"Pictures are encoded while it trains, on the same GPU{where}."
    *first, last = choices.encoder_devices
    encodes = f"{', '.join(first)} and {last} encode" if first else f"{last} encodes"
    them = "it" if choices.num_training == 1 else "them"
    return f"Pictures are encoded while it trains: {trains}{where}, and {encodes} for {them}.{_idle(choices)}"


def _idle(choices: Choices) -> str:
    """A sentence on the GPU that is left over where each encodes for one that trains; no text where there is none."""
    if not choices.encoder_devices or choices.num_training + len(choices.encoder_devices) == choices.num_gpus:
        return ""
    return f" cuda:{choices.num_gpus - 1} does nothing: a GPU of this size holds the encoders of one that trains."


def _memory_count(choices: Choices) -> str:
    parts = ", ".join(f"{part} {gib:.1f}" for part, gib in choices.memory.items())
    return f"{sum(choices.memory.values()):.1f} of {choices.gpu.memory_gib:g} GiB ({parts})"


def _batch_reason(choices: Choices) -> str:
    old = f"the old batch of 1 x accumulation {choices.accumulation}"
    if choices.global_batch_size == choices.accumulation:
        return f"{old}: samples of one update, over all GPUs"
    return f"samples of one update, one for each GPU that trains; {old} would leave some idle"
