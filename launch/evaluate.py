"""The command `fluxfill evaluate`."""

import subprocess
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.arguments import require_paths
from launch.command import render_evaluate


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")],
    step: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="A checkpoint's step; may be given again. By default all.", show_default=False),
    ] = None,
    data: Annotated[
        str,
        typer.Option(metavar="holdout|train|DIR", help="Pictures: the run's own, or a folder with target/ and mask/."),
    ] = "holdout",
    against: Annotated[
        str, typer.Option(metavar="base|OTHER_RUN", help="What all steps are held against: the base, or a run.")
    ] = "base",
    weights: Annotated[
        Literal["live", "ema"], typer.Option(help="The trained weights, or their moving average.")
    ] = "live",
    images: Annotated[int, typer.Option(metavar="N", min=1, help="At most so many pictures.")] = 64,
    sampler_steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="By default validation.sampler_steps.", show_default=False)
    ] = None,
    consistency: Annotated[
        bool, typer.Option(help="Also mask each hole's surroundings and fill them again; as long once more.")
    ] = True,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE",
            help="The score that decides, such as loss or hole_ssim; by default that of checkpoint.keep_best.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base, where model.base of the run has moved.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="By default RUN/evaluation.", show_default=False)
    ] = None,
) -> None:
    """Measure which checkpoint fills best. Says whether the difference is more than noise.

    Base and checkpoints fill the same holes with the same noise. Writes evaluation.json, and evaluation.html to look
    at: scores in the hole, outside and on the seam, with intervals; curves over steps; pictures side by side.

    Example: fluxfill evaluate runs/fill-lora --step 1000 --step 2000
    """
    places = {"RUN": run}
    if data not in ("holdout", "train"):
        places["--data"] = Path(data)
    if against != "base":
        places["--against"] = Path(against)
    require_paths(places)
    options = {
        "--data": data,
        "--against": against,
        "--weights": weights,
        "--images": images,
        "--sampler-steps": sampler_steps,
        "--by": by,
        "--base": base,
        "--out": out,
    }
    command = render_evaluate(run, step or [], options, consistency=consistency)
    raise typer.Exit(subprocess.run(command, check=False).returncode)
