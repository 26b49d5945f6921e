"""The command `fluxfill check`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from configs.gpu_profiles import load_gpu_profile
from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports
from configs.supervision import BAD_INPUT
from launch.arguments import ConfigPath, Overrides
from launch.check.result import Check


def check(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The GPU that will train, as 24GB or h100-80gb; by default this machine's."),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Training processes; by default one per GPU.", show_default=False),
    ] = None,
    steps: Annotated[bool, typer.Option(help="Make two real steps of training at the end.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Try everything that can fail before GPU hours burn. Packages, GPUs, model, pictures, cache, disk, memory, and two
    steps of training.

    Changes nothing but data.cache/scan, where what it finds out about the pictures is kept for preprocessing (and
    data.cache/copies, of pictures on servers). The steps run in a folder that goes again. Exit codes: 0 no error (there
    may be warnings), 2 an error.

    Example: fluxfill check configs/fill_lora.yaml --gpu 80GB
    """
    gpu_gib = None if gpu is None else load_gpu_profile(gpu).memory_gib
    quiet_libraries()
    lighten_imports()
    from launch.check.report import (  # slow to import, for this command alone
        count_states,
        print_check,
        render_json,
    )
    from launch.check.run import Request, run_checks

    request = Request(config, tuple(overrides or ()), num_processes, gpu_gib, steps)
    console = Console()

    def tell(made: Check) -> None:
        if not as_json:
            print_check(console, made)

    with _open_progress(Console(stderr=True) if as_json else console) as progress:
        made = run_checks(request, progress, tell)
    if as_json:
        typer.echo(render_json(made))
    else:
        console.print(f"\n{config}: {count_states(made)}", highlight=False, markup=False, soft_wrap=True)
    if any(check.state == "error" for check in made):
        raise typer.Exit(BAD_INPUT)


def _open_progress(console: Console) -> Progress:
    """Bars of what takes long, which go when it is done; none where there is no terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}"))
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal)
