"""The command group `fluxfill config`."""

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError
from configs.loading import load_config
from configs.upgrade import upgrade_config
from data.storage.atomic_write import write_text_atomically
from launch.arguments import ConfigPath

app = typer.Typer(
    help="Bring configs of earlier releases up to date.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Makes a group of it while it has one command."""


@app.command()
def upgrade(
    config: ConfigPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and write nothing.")] = False,
) -> None:
    """Bring a config up to date. Keys that are gone go, its version is written, all other text stays as it is.

    Says what changed, and last of all what is still wrong with it, if anything is (exit code 2).

    Example: fluxfill config upgrade configs/old.yaml --dry-run
    """
    path = Path(config)
    text, changes = upgrade_config(path)
    for change in changes:
        typer.echo(f"{path}: {change}")
    if not changes:
        typer.echo(f"{path}: is up to date.")
    elif dry_run:
        typer.echo(f"{path}: nothing was written.")
        return
    else:
        try:
            write_text_atomically(path, text)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}). Change its permissions.") from error
    load_config(path)
