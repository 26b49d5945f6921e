"""Training jobs on a real SLURM that somebody else ends, or that lose a process or a node: each ends as the run that
nothing happened to, or stays ended."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm import controller
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import HELD_AT, TWO_RANKS_EACH, Submitted, assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def wait_until_stopped(job: Submitted, cluster: Cluster) -> None:
    """Return when the job runs no more, or is being ended."""
    wait_for(lambda: None if cluster.states(job.jobs[0]) == ["RUNNING"] else "ended", f"{job.run.name} runs on")


def test_a_job_that_is_requeued_from_outside_goes_on(
    submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster
) -> None:
    job = submit("requeued", hold_at=HELD_AT)
    job.wait_until_held()
    cluster.run("scontrol", "requeue", job.jobs[0])
    job.release()
    assert_same_run(job, undisturbed)


@pytest.mark.parametrize("partition", ["scavenge", "scavenge-grace"])
def test_a_job_that_is_preempted_goes_on_afterwards_once(
    partition: str, submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster, tmp_path: Path
) -> None:
    """Without a grace SLURM ends the job and puts it back into the queue; with one it tells the step alone, and a job
    that has ended by then is not put back unless it asks for it."""
    job = submit(partition, f"slurm.partition={partition}", hold_at=HELD_AT)
    job.wait_until_held()
    gpus = ("--partition=urgent", "--nodes=2", "--gpus-per-node=8", "--output=/dev/null")
    urgent = cluster.submit(f"#!/bin/sh\nuntil [ -e '{tmp_path}/done' ]; do sleep 0.1; done\n", *gpus, folder=tmp_path)
    wait_for(lambda: "heard" if "death signal" in job.log else None, "SLURM sent no signal")
    job.release()
    wait_for(lambda: "runs" if cluster.states(urgent) == ["RUNNING"] else None, "the urgent job does not start")
    job.wait_for_restart()
    assert cluster.states(job.jobs[0]) == ["PENDING"]
    (tmp_path / "done").touch()
    assert_same_run(job, undisturbed)
    first, second = job.ends()
    decision = {"scavenge": "left", "scavenge-grace": "restart"}[partition]
    assert (first["code"], first["decision"], second["decision"]) == (75, decision, "done")
    assert second["start"] == first["progress"] > HELD_AT


def test_a_killed_rank_ends_the_others_and_the_job_goes_on_from_its_checkpoint(
    submit: Callable[..., Submitted], undisturbed_four: Submitted
) -> None:
    job = submit("killed", *TWO_RANKS_EACH, hold_at=HELD_AT)
    job.wait_until_held()
    saved = job.run / "checkpoints" / "step-00000003" / "COMPLETE"
    wait_for(lambda: "saved" if saved.exists() else None, "no checkpoint")
    assert len(job.processes("trainer/main.py")) == 4
    os.kill(job.processes("trainer/main.py")[-1], signal.SIGKILL)
    job.release()
    assert_same_run(job, undisturbed_four)
    first, second = job.ends()
    assert (first["code"], first["decision"]) == (1, "restart")
    assert second["start"] == first["progress"] == 3, "its checkpoint's step"


def test_a_node_that_is_taken_away_ends_the_start_and_not_the_run(
    submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster
) -> None:
    """srun may end with 0 then."""
    job = submit("lost-node", hold_at=HELD_AT)
    job.wait_until_held()
    cluster.take_away(cluster.nodes[1])
    wait_until_stopped(job, cluster)
    job.release()
    cluster.bring_back(cluster.nodes[1])
    assert_same_run(job, undisturbed)


def test_what_is_noted_in_a_jobs_comment_outlives_its_restart(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many starts could read nothing of the run's folder: nobody but the controller can keep that."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    number = cluster.submit("#!/bin/sh\nsleep 600\n", "--comment=my own", folder=tmp_path)
    wait_for(lambda: "started" if cluster.states(number) == ["RUNNING"] else None, f"{number} does not start")
    job = controller.show_job(number)
    assert job is not None and (job.comment, job.unread) == ("my own", 0)
    controller.note_unread(job, 2)
    controller.requeue(number)
    wait_for(lambda: "requeued" if cluster.show(number)["Restarts"] == "1" else None, f"{number} is not requeued")
    job = controller.show_job(number)
    assert job is not None and (job.comment, job.unread) == ("my own", 2)
    controller.note_unread(job, 0)
    assert cluster.show(number)["Comment"].strip() == "my own"
    cluster.run("scancel", number)


def test_scancel_ends_a_job_for_good(submit: Callable[..., Submitted], cluster: Cluster) -> None:
    job = submit("cancelled", hold_at=HELD_AT)
    job.wait_until_held()
    cluster.run("scancel", job.jobs[0])
    wait_until_stopped(job, cluster)
    job.release()
    assert job.finish() == "CANCELLED"
    assert cluster.show(job.jobs[0])["Restarts"] == "0"
    assert [end["decision"] for end in job.ends()] == ["left"]


def test_the_jobs_of_a_chain_take_over_from_each_other(
    submit: Callable[..., Submitted], undisturbed: Submitted, cluster: Cluster
) -> None:
    chain = submit("chained", "slurm.chain=3", hold_at=HELD_AT)
    first, second, third = chain.jobs
    chain.wait_until_held()
    cluster.run("scancel", "--signal=USR1", first)
    chain.release()
    assert cluster.wait(first) == "FAILED" and cluster.show(first)["Restarts"] == "0"
    assert cluster.wait(second) == "COMPLETED"
    assert cluster.wait(third) == "CANCELLED", "SLURM takes it away: what it waits for cannot come true"
    assert chain.metrics() == undisturbed.metrics()
