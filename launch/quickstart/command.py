"""The command `fluxfill quickstart`."""

import difflib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.errors import InputError
from configs.gpu_profiles import is_profile_file, load_gpu_profile
from configs.loading import load_config
from configs.slurm_schema import SlurmConfig
from launch.quickstart.choices import choose
from launch.quickstart.folder import Comparison, compare_folder, write_folder

FILL = "black-forest-labs/FLUX.1-Fill-dev"
_COLOURS = {"-": "red", "+": "green", "@": "cyan"}


def quickstart(
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", "--gpu_memory", metavar="SIZE", help="24GB, 40GB or 80GB.", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="In its place a GPU by name, such as h100-80gb, or a YAML file.", show_default=False
        ),
    ] = None,
    num_gpus: Annotated[
        int, typer.Option("--num-gpus", "--num_gpus", metavar="N", min=1, help="GPUs of each machine.")
    ] = 1,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")] = Path("flux-inpainting"),
    online: Annotated[
        bool,
        typer.Option("--online", help="Encode pictures while training, on the last GPUs, not once before it."),
    ] = False,
    model: Annotated[str, typer.Option(metavar="ID_OR_FOLDER", help="The model to start from.")] = FILL,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that were edited, too.")] = False,
) -> None:
    """Write a folder to train in, with a config for your GPUs. The script that takes your pictures over, and start
    scripts, are in it too.

    Run again, after an upgrade, or for SLURM jobs that ask for what the config's section slurm says, it writes what was
    not edited; where an edited file would have to change, as for other GPUs, nothing.

    Example: fluxfill quickstart --gpu-memory 80GB --num-gpus 2
    """
    if (gpu is None) == (gpu_memory is None):
        raise InputError(
            "Say which GPU: --gpu-memory 24GB, 40GB or 80GB, or --gpu with a name such as h100-80gb; one of the two."
        )
    from launch.quickstart.render import CONFIG, EXECUTABLE, render_files  # with jinja2, which no other command needs

    name = gpu or gpu_memory or ""
    profile = load_gpu_profile(name)
    choices = choose(profile, num_gpus=num_gpus, num_nodes=nodes, online=online)
    folder = Path(os.path.abspath(out))
    slurm = _slurm_section(folder / CONFIG, is_lost=force)
    texts = render_files(
        choices,
        gpu_name=str(Path(name).expanduser().absolute()) if is_profile_file(name) else name,
        folder=folder,
        model=_model(model),
        python=sys.executable,
        slurm=slurm,
    )
    comparison = compare_folder(folder, texts)
    if not force:
        _show_edited(folder, comparison)
        if comparison.in_conflict:
            raise InputError(
                f"{', '.join(comparison.in_conflict)} in {out}: edited since quickstart wrote it, and what it would "
                "write now differs, as shown. Nothing was written. Give another --out, or delete what you do not "
                "need and run this again; --force overwrites what was edited, and it is lost."
            )
    written = write_folder(folder, comparison, executable=EXECUTABLE, force=force)
    for name in written:
        typer.echo(f"written: {out / name}")
    if not written:
        typer.echo(f"{out}: nothing to write, all is there.")
    script = "migrate_your_data.py"
    unedited = ': "/path/to/your/' in (folder / script).read_text(encoding="utf-8", errors="replace")
    following = f"edit the three paths in {out / script}, and run it" if unedited else f"run {out / script}"
    typer.echo(f"Next: {following}. {out / 'README.md'} says the rest.")


def _model(given: str) -> str:
    """A hub id as it is; a folder as an absolute path, because the config lies in another one."""
    folder = Path(given).expanduser()
    return str(folder.resolve()) if folder.is_dir() or given.startswith((".", "/", "~")) else given


def _slurm_section(config: Path, *, is_lost: bool) -> SlurmConfig:
    """What the folder's config asks of a cluster; nothing where it is not there yet.

    is_lost: it is about to be overwritten, whatever is in it. Else raises InputError where it does not load: the jobs
    would ask for nothing of what it says.
    """
    if not os.path.exists(config):  # or may not be seen, which the comparison tells of
        return SlurmConfig()
    try:
        return load_config(config).slurm
    except InputError as error:
        if is_lost:
            return SlurmConfig()
        raise InputError(
            f"{error}\nThe SLURM jobs ask for what this config's section slurm says. Nothing was written: mend it and "
            "run quickstart again, or give another --out; --force writes a new config, and yours is lost."
        ) from error


def _show_edited(folder: Path, comparison: Comparison) -> None:
    """The edited files as unified differences: from the user's text to what quickstart writes."""
    console = Console(stderr=True)
    for name, edited in comparison.edited.items():
        new = comparison.texts[name]
        names = (str(folder / name), f"{name} as quickstart writes it")
        for line in difflib.unified_diff(edited.splitlines(), new.splitlines(), *names, lineterm=""):
            console.print(line, style=_COLOURS.get(line[:1]), markup=False, highlight=False, soft_wrap=True)
        if name in comparison.kept:
            console.print(f"{name}: kept as you edited it.", markup=False, highlight=False, soft_wrap=True)
