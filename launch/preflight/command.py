"""The command `fluxfill preflight`, which is also a job's first step."""

import os
from dataclasses import replace

import typer
from rich.console import Console

from configs.errors import InputError
from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports
from configs.loading import load_config
from launch.arguments import ConfigPath, Overrides
from launch.check.report import count_states, print_check
from launch.check.result import Check
from launch.preflight.compare import Finding
from launch.preflight.place import find_place
from launch.preflight.run import run_preflight


def preflight(
    config: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Find out whether the nodes of a run are fit for it. Files, packages, clocks, GPUs, memory, and the network.

    Lists all that is wrong, in under two minutes, and names the nodes.

    On this machine alone; on all nodes by `srun --ntasks-per-node=1`, or under `accelerate launch -m
    launch.preflight.command`. Jobs of `fluxfill slurm submit` begin with it. Exit codes: 0 nothing is wrong, 2
    something is, 1 a node is broken.

    Example: fluxfill preflight configs/fill_lora.yaml
    """
    try:
        encoding = load_config(config, overrides or []).data.encoder_devices
    except InputError:  # which is a finding like others: of a node that does not see the config
        encoding = None
    place = find_place(os.environ, encoding)
    if place is None:
        return
    quiet_libraries()
    lighten_imports()
    told: list[Check] = []
    console = Console()
    code = run_preflight(config, overrides or [], place, None, lambda finding: told.append(show(console, finding)))
    if told:
        console.print(f"\n{config}: {count_states(told)}", highlight=False, markup=False, soft_wrap=True)
    if code:
        raise typer.Exit(code)


def show(console: Console, finding: Finding) -> Check:
    """Print a finding with the nodes that it concerns."""
    where = f"{', '.join(finding.nodes)}: " if finding.nodes else ""
    check = replace(finding.check, what=f"{where}{finding.check.what}")
    print_check(console, check)
    return check


if __name__ == "__main__":
    typer.run(preflight)
