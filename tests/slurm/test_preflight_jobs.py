"""The preflight of training jobs on a real SLURM: before they train, and when a node is broken."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.restarts import read_job_events
from tests.holding import HOLD
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import TWO_RANKS_EACH, Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

FEW_STEPS = ("slurm.preflight=true", "train.steps=4", f'slurm.env={{PYTHONPATH: "{HOLD}"}}')  # it is patient


def test_a_job_looks_at_its_nodes_before_it_trains(submit: Callable[..., Submitted], cluster: Cluster) -> None:
    job = submit("looked-at", *FEW_STEPS)
    assert job.finish() == "COMPLETED", job.log
    assert "64 MiB between 2 ranks in" in job.log and "config, manifest, commit and" in job.log
    assert f"2 nodes reach {cluster.nodes[0]}, over lo" in job.log
    assert job.log.index("between 2 ranks") < job.log.index("accelerate.commands.launch")
    assert [line["step"] for line in job.metrics()] == [1, 2, 3, 4]


def test_a_signal_during_the_preflight_loses_nothing(submit: Callable[..., Submitted], cluster: Cluster) -> None:
    job = submit("signalled-preflight", *FEW_STEPS, hold_at="manifest.json")
    job.wait_until_held()
    cluster.run("scancel", "--signal=USR1", job.jobs[0])
    job.release()
    job.wait_for_restart()
    assert job.finish() == "COMPLETED", job.log
    assert [end["decision"] for end in job.ends()] == ["restart", "done"]


def test_a_job_starts_again_without_a_node_whose_gpus_are_gone(
    cluster: Cluster, fluxfill: Callable[..., str], config_file: Path, tmp_path: Path
) -> None:
    """nvidia-smi, stood in for, lists two GPUs, and one on the first node."""
    bad, good = cluster.nodes
    (tmp_path / "nvidia-smi").write_text(
        f"""#!/bin/sh
        last=1; [ "$SLURMD_NODENAME" = {bad} ] && last=0
        for gpu in $(seq 0 $last); do
            [ "$1" = -L ] && echo "GPU $gpu: NVIDIA H100" || echo "$gpu, NVIDIA H100, 81559, 0, 550.1, 9.0, GPU-$gpu"
        done
        """
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    given = (str(config_file), "run.name=broken-node", *FEW_STEPS, *TWO_RANKS_EACH, "slurm.nodes=1")
    scripts = fluxfill("slurm", "render", *given, "--out", str(tmp_path / "scripts"))
    around = replace(cluster, environment={**cluster.environment, "PATH": f"{tmp_path}:{cluster.environment['PATH']}"})
    id = around.run("sbatch", "--parsable", scripts.splitlines()[0], cwd=config_file.parent).strip()
    job = Submitted(cluster, config_file.parent / "broken-node", [id])
    job.wait_for_restart()
    assert job.finish() == "COMPLETED", job.log
    assert f"{bad}: 1 of 2 GPUs answer" in job.log and f"without {bad}" in job.log
    assert cluster.show(id)["ExcNodeList"] == bad
    assert [event.nodes for event in read_job_events(job.run) if event.what == "started"] == [bad, good]
    assert [(end["code"], end["decision"]) for end in job.ends()] == [(1, "restart"), (0, "done")]
