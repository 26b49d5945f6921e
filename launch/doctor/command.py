"""The command `fluxfill doctor`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from configs.redact import redact
from launch.arguments import OutFile, print_or_write


def doctor(
    place: Annotated[
        Path | None,
        typer.Argument(metavar="RUN|CONFIG", help="A run's folder, or a config; by default the machine alone."),
    ] = None,
    out: OutFile = None,
) -> None:
    """Gather what a bug report needs. Versions, GPUs, environment, config, and the end of a run's logs.

    Tokens, passwords and queries of URLs are left out, and the home folder is shortened to ~. Read it before you post
    it: captions, names of folders and of pictures stay.

    Example: fluxfill doctor runs/fill-lora --out report.md
    """
    from launch.doctor.gather import gather, render  # slow to import, for this command alone

    print_or_write(redact(render(gather(place, os.environ)), home=str(Path.home())), out)
