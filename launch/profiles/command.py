"""`fluxfill gpus`: GPU profiles listed, and one of this machine written."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError
from configs.gpu_profiles import FOLDER, GpuProfile, gpu_names, own_folder, profile_files, read_profile
from data.storage.atomic_write import write_text_atomically
from launch.profiles.detect import missing_rates, render_profile

app = typer.Typer(
    help="List GPU profiles, or make one of this machine. --gpu takes them by name.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_COLUMNS = ("profile", "GiB", "bf16", "fp8", "memory", "NVLink", "NIC", "a node", "")
_LEGEND = (
    "bf16, fp8: dense TFLOP/s. memory: its bandwidth, GB/s. NVLink: GB/s, both directions together.\n"
    "NIC: Gbit/s for each GPU. a node: GPUs of one. -: none, or the machine decides.\n"
    "untested: its maker's figures; fluxfill has not run on it."
)


@app.command("list")
def list_profiles() -> None:
    """List the profiles: fluxfill's and, marked *, your own.

    Example: fluxfill gpus list
    """
    read: dict[str, GpuProfile] = {}
    problems = []
    for name, path in profile_files().items():
        try:
            read[f"{name}*" if path.parent != FOLDER else name] = read_profile(path)
        except InputError as error:
            problems.append(str(error))
    typer.echo("\n".join([*_table(read), "", _LEGEND, f"Your own go into {own_folder()}, one YAML file each."]))
    if problems:
        raise InputError("\n".join(problems))


@app.command()
def detect(
    write: Annotated[
        str | None,
        typer.Option("--write", metavar="NAME", help="Keep it as a profile of your own.", show_default=False),
    ] = None,
) -> None:
    """Make a profile of this machine's GPUs. Memory, NVLink, network, how many. Needs no torch.

    Rates that no driver tells are those of the known card of its name, else null, for you to fill in. Without --write
    it is printed.

    Example: fluxfill gpus detect --write our-nodes
    """
    path = None if write is None else _path_of(write)
    text = render_profile(os.environ)
    if path is None:
        typer.echo(text, nl=False)
    else:
        _write(path, text)
        typer.echo(f"{path}: written. Take it by --gpu {path.stem}")
    if missing := missing_rates(text):
        typer.echo(f"Not known of this card, and a plan needs it: {', '.join(missing)}. Fill in.", err=True)


def _table(profiles: dict[str, GpuProfile]) -> Iterator[str]:
    yield _line(*_COLUMNS)
    for name, profile in profiles.items():
        rates = (profile.bf16_tflops, profile.fp8_tflops, profile.memory_bandwidth_gb_s)
        links = (profile.nvlink_gb_s, profile.nic_gbit_s, profile.gpus_per_node)
        figures = ["-" if figure is None else f"{figure:g}" for figure in (profile.memory_gib, *rates, *links)]
        yield _line(name, *figures, "untested" if profile.untested else "")


def _line(name: str, *cells: str) -> str:
    *figures, mark = cells
    return f"{name:17}" + "".join(f"{figure:>8}" for figure in figures) + f"  {mark}".rstrip()


def _path_of(name: str) -> Path:
    """The file of a new profile of one's own. Raises InputError for a name that is no name, or taken."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith((".yaml", ".yml")):
        raise InputError(f"--write {name}: write letters, digits, dots and hyphens, such as our-nodes, without .yaml.")
    path = own_folder() / f"{name}.yaml"
    if path.exists() or name in gpu_names():
        taken = path if path.exists() else FOLDER / path.name
        raise InputError(f"--write {name}: {taken} is there already. Take another name, or remove the file.")
    return path


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, text)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from error
