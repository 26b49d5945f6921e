"""The command `fluxfill fill`."""

import subprocess
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.arguments import require_paths
from launch.command import render_fill


def fill(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_EXPORT",
            help="A run, one of its checkpoints, an exported FLUX.1-Fill folder, or an adapter.",
        ),
    ],
    image: Annotated[Path, typer.Option(metavar="FILE_OR_DIR", help="The picture, or a folder of pictures.")],
    mask: Annotated[
        Path,
        typer.Option(metavar="FILE_OR_DIR", help="White = repaint. For a folder: one of masks with the same names."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What to paint. By default what a .txt beside the picture says.", show_default=False
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(metavar="N", help="The step of a run's checkpoint; by default the newest.", show_default=False),
    ] = None,
    weights: Annotated[
        Literal["live", "ema"], typer.Option(help="The trained weights, or their moving average.")
    ] = "live",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Gets <name>.png, and <name>.grid.png to look at.")] = Path(
        "fills"
    ),
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that an adapter belongs to, where nothing beside it says.",
            show_default=False,
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=16,
            help="Size at which a hole is filled; by default the run's, or 1024.",
            show_default=False,
        ),
    ] = None,
    sampler_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="By default validation.sampler_steps, or 28.", show_default=False),
    ] = None,
    feather: Annotated[
        float, typer.Option(metavar="PIXELS", min=0, help="Pixels over which the seam is blended.")
    ] = 8.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The seed of the noise, for another fill.", show_default=False)
    ] = None,
) -> None:
    """Fill holes in your own pictures with what a run learned. Pictures keep their size.

    What is around the hole is cut out, filled at the size of the training, its colours matched to the picture's, and
    pasted back with a feathered seam: beyond it, every pixel is as it was. The sampler is that of validation.

    Example: fluxfill fill runs/fill-lora --image sofa.jpg --mask sofa-mask.png --prompt "an empty room"
    """
    require_paths({"RUN_OR_EXPORT": source, "--image": image, "--mask": mask})
    options = {
        "--prompt": prompt,
        "--step": step,
        "--weights": weights,
        "--base": base,
        "--resolution": resolution,
        "--sampler-steps": sampler_steps,
        "--feather": feather,
        "--seed": seed,
    }
    command = render_fill(source, image, mask, out, options)
    raise typer.Exit(subprocess.run(command, check=False).returncode)
