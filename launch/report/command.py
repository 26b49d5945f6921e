"""The commands `fluxfill report` and `fluxfill watch`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError, os_errors_named
from data.storage.atomic_write import write_text_atomically
from launch.report.page import render_report
from launch.report.run import RunReader
from launch.report.serve import WatchServer
from launch.status.run import find_runs, is_run

PAGE = "report.html"


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; the run may still go on.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"By default RUN/{PAGE}.", show_default=False)
    ] = None,
) -> None:
    """Write one HTML file that shows a run. Curves, what befell it, pictures by step, config, hardware, cost.

    The file needs no other and asks the network for nothing: send it to anybody. Names of folders and hosts are in it,
    tokens and passwords are not.

    Example: fluxfill report runs/fill-lora
    """
    place = out or run / PAGE
    found = _find([run])
    if len(found) > 1:
        names = ", ".join(str(each) for each in found[:4]) + (", ..." if len(found) > 4 else "")
        raise InputError(
            f"{run}: {len(found)} runs are in it ({names}), and a report shows one. Give one of them; "
            f"`fluxfill watch {run}` lays them over each other."
        )
    text = render_report(RunReader(found[0]))
    with os_errors_named(place, cure=" Give another place by --out."):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(place, text)
    typer.echo(f"{place}: {len(text.encode()) / 2**20:.1f} MiB")


def watch(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or of several runs; laid over each other.")
    ],
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="The port on this machine; 0 takes a free one.")
    ] = 8384,
) -> None:
    """Show runs in a browser while they train. The page of `fluxfill report`, live, several runs laid over each other.

    Reads the runs' folders and nothing else, so it works beside jobs on other machines. It answers on this machine
    alone (127.0.0.1); from elsewhere: ssh -L 8384:localhost:8384 THIS-MACHINE.

    Example: fluxfill watch runs/fill-lora runs/slower
    """
    folders = _find(runs)
    try:
        server = WatchServer(folders, port)
    except OSError as error:
        raise InputError(f"--port {port}: cannot be had ({error.strerror}). Give another one, or 0.") from error
    typer.echo(f"{server.url}  ({len(folders)} run{'s' if len(folders) > 1 else ''}; Ctrl-C ends)")
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


def _find(places: list[Path]) -> list[Path]:
    """The runs, each once. Raises InputError for a place that is none and has none below it."""
    found: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise InputError(f"{place}: no such folder. Give the folder of a run, as runs/NAME.")
        below = [place] if is_run(place) else find_runs(place)
        if not below:
            raise InputError(f"{place}: no run is in it (metrics.jsonl, outcome.json). Give the folder of a run.")
        found |= dict.fromkeys(below)
    return list(found)
