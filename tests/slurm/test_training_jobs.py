"""Training jobs on a real SLURM to which nothing happens."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import STEPS, TWO_RANKS_EACH, Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


def test_a_job_trains_on_two_nodes_with_two_ranks_each(undisturbed_four: Submitted) -> None:
    assert [line["step"] for line in undisturbed_four.metrics()] == list(range(1, STEPS + 1))
    assert "--num_processes 4" in undisturbed_four.log and "--num_machines 2" in undisturbed_four.log
    assert [end["decision"] for end in undisturbed_four.ends()] == ["done"]
    assert (undisturbed_four.run / "checkpoints" / f"step-{STEPS:08d}" / "COMPLETE").exists()


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_a_job_trains_under_engines_that_shard(engine: str, submit: Callable[..., Submitted]) -> None:
    job = submit(engine, *TWO_RANKS_EACH, f"parallel.engine={engine}", "train.steps=4")
    assert job.finish() == "COMPLETED", job.log
    assert [line["step"] for line in job.metrics()] == [1, 2, 3, 4]


def test_the_script_in_the_repository_works_as_it_stands(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    """Submitted with no variable but CONFIG, of which srun's tasks would get none; and SBATCH_NO_REQUEUE, which nobody
    has removed, is told in the log."""
    options = ["--output", f"{tmp_path}/log", "--cpus-per-task=2", f"--export=CONFIG={config_file}"]
    words = ["slurm/train.sbatch", f"run.dir={tmp_path}", "run.name=plain", "train.steps=3", "train.warmup_steps=1"]
    words += ['slurm.env={OMP_NUM_THREADS: "1"}']
    around = replace(cluster, environment={**cluster.environment, "SBATCH_NO_REQUEUE": "1"})
    job = around.run("sbatch", "--parsable", *options, *words, cwd=ROOT).strip()
    assert cluster.wait(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert (tmp_path / "plain" / "metrics.jsonl").read_text().count("\n") == 3
    assert "this job may not be requeued (Requeue=0" in (tmp_path / "log").read_text()


def test_a_job_that_another_job_submits_takes_nothing_of_it_for_its_own(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    """A task of an array, restarted, with memory for a node; and the child asks for memory for each core, beside which
    srun would not take the other."""
    given = [config_file, f"run.dir={tmp_path}", "run.name=child", "train.steps=2", "train.warmup_steps=1"]
    given += ["slurm.nodes=1", "slurm.sbatch_lines=[--mem-per-cpu=400]", 'slurm.env={OMP_NUM_THREADS: "1"}']
    words = " ".join(f"'{word}'" for word in ["slurm", "submit", *map(str, given)])
    script = f"#!/bin/sh\n{sys.executable} -P -m launch {words} > submitted 2>&1\n"
    around = replace(cluster, environment={**cluster.environment, "SLURM_RESTART_COUNT": "7"})
    parent = around.submit(script, "--array=2-2", "--mem=900", "--output=/dev/null", folder=tmp_path)
    assert cluster.wait(parent) == "COMPLETED", (tmp_path / "submitted").read_text()
    child = (tmp_path / "submitted").read_text().split()[0]
    log = tmp_path / f"child-{child}.log"
    assert cluster.wait(child) == "COMPLETED", log.read_text()
    assert f"job {child}, start 1: 1 x 1 processes" in log.read_text()
    assert (tmp_path / "child" / "metrics.jsonl").read_text().count("\n") == 2
