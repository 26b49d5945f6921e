"""What a real SLURM leaves in the environment of jobs, and whom a preprocessing worker takes itself for there."""

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
WHO = (
    f"PYTHONPATH={ROOT} {sys.executable} -c "
    "'import os; from data.preprocessing.worker import which_worker; print(which_worker(os.environ))'"
)


def test_tasks_of_an_array_are_its_workers_and_a_job_that_one_submits_is_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "child").write_text(f"#!/bin/sh\n{WHO} > child.said\n")
    script = f"#!/bin/sh\n{WHO} > said.$SLURM_ARRAY_TASK_ID\n[ $SLURM_ARRAY_TASK_ID = 1 ] || exit 0\n"
    job = cluster.submit(f"{script}sbatch --wait child\n", "--array=1-3", folder=tmp_path)
    assert cluster.wait(job) == "COMPLETED"
    said = [(tmp_path / f"said.{task}").read_text() for task in (1, 2, 3)]
    assert said == [f"worker {task} of 3 (SLURM array task {task})\n" for task in (1, 2, 3)]
    assert (tmp_path / "child.said").read_text() == "worker 1 of 1 (alone)\n"


def test_tasks_of_a_step_are_workers_and_a_job_that_one_submits_is_alone(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "child").write_text(f"#!/bin/sh\n{WHO} > child.said\n")
    (tmp_path / "task").write_text(
        f"#!/bin/sh\n{WHO} > said.$SLURM_PROCID\n[ $SLURM_PROCID = 1 ] || exit 0\nsbatch --wait child\n"
    )
    (tmp_path / "task").chmod(0o755)
    job = cluster.submit("#!/bin/sh\nsrun ./task\n", "--ntasks=2", folder=tmp_path)
    assert cluster.wait(job) == "COMPLETED"
    said = [(tmp_path / f"said.{task}").read_text() for task in (0, 1)]
    assert said == [f"worker {task + 1} of 2 (SLURM task {task})\n" for task in (0, 1)]
    assert (tmp_path / "child.said").read_text() == "worker 1 of 1 (alone)\n"
