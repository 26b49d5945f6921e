"""Arguments that several commands take: a config, keys of it to set otherwise, and where to write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError, list_problems

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/fill_lora.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the config to set otherwise: train.lr=5e-5", show_default=False),
]
OutFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there instead of printing it.")]


def print_or_write(text: str, out: Path | None) -> None:
    """A command's text on standard output, or in the file of --out. Raises InputError if that cannot be written."""
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written ({error.strerror}). Give a file in a folder that exists."
        ) from error


def require_paths(given: Mapping[str, Path]) -> None:
    """Raises InputError that names every path, by the option it was given to, at which nothing is.

    The programs that read them say more, but only after they have imported torch and diffusers.
    """
    if missing := [
        f"{option} {path}: there is no such file or folder." for option, path in given.items() if not path.exists()
    ]:
        raise InputError(list_problems(missing))
