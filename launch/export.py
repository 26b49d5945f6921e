"""The command `fluxfill export`."""

import subprocess
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.arguments import require_paths
from launch.command import render_export


def export(
    source: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A step-<number> folder, or a run: its newest one.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not be there yet.")],
    step: Annotated[
        str | None,
        typer.Option(metavar="N|best", help="A run's step, or the one that was validated best."),
    ] = None,
    form: Annotated[
        Literal["diffusers", "comfyui", "bfl", "onefile", "merged", "peft", "kohya"],
        typer.Option("--format", help="For which program: see above."),
    ] = "diffusers",
    weights: Annotated[
        Literal["live", "ema"], typer.Option(help="The trained weights, or their moving average.")
    ] = "live",
    dtype: Annotated[
        Literal["fp32", "bf16", "fp8"] | None,
        typer.Option(
            help="By default adapters are written in fp32, whole models in bf16; fp8 is for whole models.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The model that the run began with, where it lies elsewhere now.", show_default=False
        ),
    ] = None,
) -> None:
    """Make of a checkpoint what other programs load. An adapter, or a whole FLUX.1-Fill, for the program that is named.

    Needs no GPU. Works on the checkpoints of every engine and any number of GPUs, while the run goes on, and holds
    4 GiB of weights at a time. What was written is read back, and its velocity compared with the run's.

    \b
    --format   of an adapter's run            of a full fine-tune
    diffusers  LoRA, DoRA, LoKr: diffusers,   a folder: diffusers
               OneTrainer, ai-toolkit (not DoRA)
    comfyui    LoRA, LoKr, a DoRA's changes:  one file by BFL's names,
               ComfyUI, with a workflow       with a workflow
    peft       with adapter_config.json       -
    kohya      LoRA: sd-scripts; LoKr:        -
               LyCORIS
    merged     in its base, a folder          -
    bfl        in its base, one file          one file by BFL's names
    onefile    in its base, one file          one file, diffusers' names

    Example: fluxfill export runs/fill-lora --step best --format comfyui --out sofa-removal
    """
    require_paths({"CHECKPOINT_OR_RUN": source})
    command = render_export(source, out, step=step, form=form, weights=weights, dtype=dtype, base=base)
    raise typer.Exit(subprocess.run(command, check=False).returncode)
