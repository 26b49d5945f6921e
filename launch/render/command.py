"""The command `fluxfill render`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import InputError
from configs.loading import load_config
from launch.arguments import ConfigPath, Overrides
from launch.command import choose_on_nodes
from launch.gpus import gpu_of_nodes, idle_gpus
from launch.render.accelerate import render_lines
from launch.render.claims import parse_claims, require_run_on_claim, warnings
from launch.render.kubernetes import Pods, render_jobset, render_pytorchjob
from launch.slurm.command import gpus_per_node


def render(
    config: ConfigPath,
    launcher: Annotated[
        Literal["accelerate", "jobset", "pytorchjob"],
        typer.Option(
            "--for", help="accelerate: a line for each node's shell; jobset, pytorchjob: a manifest for Kubernetes."
        ),
    ],
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="By default slurm.nodes.", show_default=False)
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus-per-node",
            metavar="N",
            min=1,
            help="By default as slurm.gpu or gpus_per_node say.",
            show_default=False,
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The first node, for accelerate.", show_default=False)
    ] = None,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="The port on the first node, for accelerate.")
    ] = 29500,
    image: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="Container image with fluxfill, for Kubernetes.", show_default=False),
    ] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:PATH", help="A PersistentVolumeClaim, and where it is mounted.", show_default=False),
    ] = None,
) -> None:
    """Show how a launcher other than SLURM starts a run. The run is one on several nodes; nothing is started.

    Python, fluxfill, config and cache must lie in the same places on all nodes. Pods run in the folder in which this is
    called; the run's folder must lie on a claim, or a pod that starts again would have lost it.

    Example: fluxfill render configs/fill_lora.yaml --for accelerate --nodes 2 --gpus-per-node 8 --head 10.0.0.1
    """
    given = overrides or []
    loaded = load_config(config, given)
    profile = gpu_of_nodes(loaded.slurm)
    count = nodes or loaded.slurm.nodes
    each = gpus or gpus_per_node(loaded, count)
    _, processes = choose_on_nodes(loaded, count, each)
    if idle := idle_gpus(loaded, count * processes):
        typer.echo(idle, err=True)
    if launcher == "accelerate":
        if head is None and count > 1:
            raise InputError("--head: give the address of the first node, at which the others reach it.")
        lines = render_lines(
            loaded,
            config,
            given,
            nodes=count,
            processes_per_node=processes,
            head=head or "127.0.0.1",
            port=port,
            cores_per_node=loaded.slurm.cpus_per_gpu * each,
        )
        for rank, line in enumerate(lines):
            typer.echo(f"# node {rank}\n{line}")
        return
    if image is None:
        raise InputError("--image: give the container image that has fluxfill.")
    command = ["fluxfill", "train", config, *given]
    folder, claims = Path.cwd(), parse_claims(claim or [])
    require_run_on_claim(loaded, folder, claims)
    for warning in warnings(loaded, config, folder, claims):
        typer.echo(warning, err=True)
    resource = "amd.com/gpu" if profile is not None and profile.is_amd else "nvidia.com/gpu"
    pods = Pods(loaded.run.name, count, each, processes, image, command, folder, claims, resource)
    typer.echo((render_jobset if launcher == "jobset" else render_pytorchjob)(pods), nl=False)
