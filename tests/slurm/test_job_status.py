"""What `fluxfill status` says of jobs of a real SLURM."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.status.jobs import ask_queue
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_job_is_found_by_its_id_while_it_trains_and_afterwards(
    submit: Callable[..., Submitted], fluxfill: Callable[..., str], cluster: Cluster
) -> None:
    job = submit("watched", "train.steps=4", hold_at=2)
    job.wait_until_held()
    page = fluxfill("status", job.jobs[0])
    job.release()
    assert page.startswith(f"watched  running  {job.run}") and f"{job.jobs[0]} on " in page
    assert job.finish() == "COMPLETED", job.log
    assert fluxfill("status", job.jobs[0]).startswith("watched  finished")


def test_a_dependency_that_cannot_come_true_is_known(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    failing = cluster.submit("#!/bin/bash\nexit 1", "--output=/dev/null", folder=tmp_path)
    assert cluster.wait(failing) == "FAILED"
    name = "a|b c"
    id = cluster.submit(
        "#!/bin/bash\n", f"--dependency=afterok:{failing}", "--job-name", name, "--output=/dev/null", folder=tmp_path
    )

    def told() -> str | None:
        jobs = ask_queue([id])
        if jobs is None:  # the controller did not answer
            return None
        [job] = jobs
        assert (job.state, job.folder) == ("PENDING", tmp_path)
        return job.reason if job.can_never_start else None

    assert wait_for(told, "the queue does not say that it can never start") == "DependencyNeverSatisfied"
    cluster.run("scancel", id)
    assert ask_queue(["999999999"]) == []
