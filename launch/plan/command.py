"""The command `fluxfill plan`."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from configs.data_schema import DataConfig
from configs.errors import InputError
from configs.fit import Cluster
from configs.flux_shape import FluxShape
from configs.gpu_profiles import load_gpu_profile
from configs.loading import load_config
from configs.memory import GIB
from configs.plan import Plan, Planned, plan_run
from configs.schema import Config
from launch.arguments import ConfigPath, Overrides
from launch.check.cures import cure_of_encoding
from launch.gpus import count_training_gpus, gpu_of_nodes, refuse_missing_gpus
from launch.plan.asked import read_shape, sample_tokens
from launch.plan.nearest import describe, nearest_that_fits
from launch.plan.report import engine_lines, fullest_apart, place, plan_lines, render_json
from launch.plan.write import write_plan


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The GPU that will train, as h100-80gb, or a profile's file; by default slurm.gpu, else 80GB.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Machines; by default slurm.nodes, which is 1.", show_default=False),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="GPUs of each; by default slurm.gpus_per_node, else the profile's, else 1.",
            show_default=False,
        ),
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Write engine, micro-batch, checkpointed blocks and what KEY=VALUE set into CONFIG."
        ),
    ] = False,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Also run the chosen step on fake tensors, with torch: half a minute."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a run would take on GPUs that need not be here. Chooses the engine by memory, time and network.

    From tables, without torch. Nothing in it was measured on a GPU: seconds are for comparing plans. Exit codes: 0 it
    fits, 2 it does not, or bad input.

    Example: fluxfill plan configs/fill_full.yaml --gpu h100-80gb --nodes 4
    """
    run = load_config(config, overrides or [])
    base = read_shape(run.model.base)
    cluster, taken = _cluster_of(run, gpu, nodes, gpus_per_node)
    if taken:
        typer.echo(f"From {config}: {', '.join(taken)}", err=as_json)
    planned = plan_run(run, base, cluster, tokens=sample_tokens(run))
    if as_json:
        typer.echo(render_json(run, base, planned))
    else:
        lines = [f"{config} on {place(run, cluster)}", "", *engine_lines(planned)]
        if planned.best is not None:
            lines += ["", *plan_lines(run, base, planned, planned.best)]
        typer.echo("\n".join(lines))
    best = planned.best
    if best is None:
        nearest = nearest_that_fits(run, base, cluster)
        raise InputError(
            f"{_why_not(planned)} {f'Nearest that fits: {nearest}.' if nearest else 'Train on larger GPUs.'}"
        )
    _refuse_full_encoders(run, cluster)
    if simulate:
        typer.echo(_simulate(run, base, best), err=as_json)
    if write:
        others = write_plan(Path(config), overrides or [], run, best)
        also = f", and {' '.join(others)}" if others else ""
        typer.echo(f"{config}: {describe(best)}{also} written", err=as_json)
    elif refusal := _refusal_as_written(planned):
        raise InputError(f"{_taken(config, run)} {refusal}. Nearest that fits: {describe(best)}. Take it: --write.")
    elif planned.as_written is not None and planned.as_written.choices != best.choices:
        typer.echo(f"{_taken(config, run)} {_compared(planned.as_written, best)}", err=as_json)


def _cluster_of(
    config: Config, gpu: str | None, nodes: int | None, gpus_per_node: int | None
) -> tuple[Cluster, list[str]]:
    """The GPUs that are planned for, and what of them the config's section `slurm` said: options go before it."""
    slurm = config.slurm
    taken = []
    if gpu is None and slurm.gpu is not None:
        taken.append(f"slurm.gpu {slurm.gpu}")
    if nodes is None and slurm.nodes > 1:
        taken.append(f"slurm.nodes {slurm.nodes}")
    if gpus_per_node is None and slurm.gpus_per_node is not None:
        taken.append(f"slurm.gpus_per_node {slurm.gpus_per_node}")
    profile = load_gpu_profile(gpu) if gpu is not None else gpu_of_nodes(slurm) or load_gpu_profile("80GB")
    each = gpus_per_node or slurm.gpus_per_node or profile.gpus_per_node or 1
    refuse_missing_gpus(config.data, each)
    training = count_training_gpus(each, config.data.encoder_devices)
    return Cluster(profile, nodes or slurm.nodes, training, each - training), taken


def _refuse_full_encoders(config: Config, cluster: Cluster) -> None:
    """Raises InputError if the GPU that encodes for others does not hold what that takes."""

    def needs(data: DataConfig) -> float:
        apart = fullest_apart(config.model_copy(update={"data": data}), cluster)
        return sum(part.bytes for part in apart[1]) if apart else 0

    apart = fullest_apart(config, cluster)
    if apart is not None and (needed := needs(config.data)) > cluster.usable_bytes:
        raise InputError(
            f"{apart[0]}, which encodes for others, takes {needed / GIB:.1f} GiB, and {cluster.usable_bytes / GIB:.1f} "
            f"may be filled. {cure_of_encoding(config.data, needs, cluster.profile.memory_gib)}"
        )


def _taken(path: str, config: Config) -> str:
    """The beginning of a sentence that goes on with what the config is started with."""
    return "parallel.engine is auto: `fluxfill train` takes" if config.parallel.engine == "auto" else f"{path} names"


def _compared(written: Plan, best: Plan) -> str:
    """What each of the two is, and its seconds where they differ as shown."""
    theirs, ours = (f"{plan.time.total:.2f} s" for plan in (written, best))
    if theirs == ours:
        return f"{describe(written)}; the plan, which --write sets: {describe(best)}"
    return f"{describe(written)}, {theirs} a step; the plan, which --write sets: {describe(best)}, {ours}"


def _refusal_as_written(planned: Planned) -> str | None:
    """What the config is started with that will not do there, and why; None where it fits."""
    if planned.as_written is None:
        [reason] = [rejection.reason for rejection in planned.rejections if rejection.engine == planned.engine]
        return f"{planned.engine}, and {reason}"
    if planned.as_written.fits:
        return None
    return f"{describe(planned.as_written)}, and {planned.cluster.usable_bytes / GIB:.1f} may be filled"


def _why_not(planned: Planned) -> str:
    if not planned.plans:
        return "No engine can train this config there."
    smallest, cluster = planned.smallest, planned.cluster
    return (
        f"It does not fit: {describe(smallest)} at least, and {cluster.usable_bytes / GIB:.1f} of the "
        f"{cluster.profile.memory_gib:g} GiB of a {cluster.profile.name} may be filled."
    )


def _simulate(config: Config, base: FluxShape, best: Plan) -> str:
    """What the step takes by a simulation in a process of its own, since launch/ imports no torch."""
    asked = {
        "method": config.method.model_dump(),
        "precision": config.model.precision,
        "shape": asdict(base),
        "side": max(config.data.resolution),
        "text": config.data.captions.text_length,
        "rows": best.micro_batch_size,
        "checkpointed": best.checkpointed,
    }
    command = [sys.executable, "-P", "-m", "trainer.simulation.run"]
    made = subprocess.run(command, input=json.dumps(asked, default=str), capture_output=True, text=True, check=False)
    if made.returncode:
        said = made.stderr.strip().splitlines() or [f"its process ended with {made.returncode}"]
        raise InputError(f"--simulate: {said[-1]}")
    counted = json.loads(made.stdout.splitlines()[-1])
    return (
        f"Simulated: activations of {counted['peak'] / GIB:.2f} GiB, by the table {best.cost.peak / GIB:.2f}; "
        f"{counted['matmul_flops'] / 1e12:,.1f} TFLOP in matrix products, by the table "
        f"{best.cost.matmul_flops / 1e12:,.1f}"
    )
