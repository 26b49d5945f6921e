"""Training jobs on a real SLURM that reach their time limit: each goes on, once, as the run that nothing happened to.

The controller looks at time limits every half minute or minute, so both jobs wait for theirs side by side.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import HELD_AT, Submitted, assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def limited(submit: Callable[..., Submitted], cluster: Cluster) -> tuple[Submitted, Submitted]:
    """Two jobs that were held at a step, and have started again: one that was told a minute before its limit, which was
    two to three minutes away, and one that was not told, and whose limit was over.

    Each goes on as soon as it is told, and has a new limit as soon as it has restarted, whatever the other does."""
    told = submit("warned", hold_at=HELD_AT, options=("--time=60", "--signal=USR2@60"))
    untold = submit("unwarned", hold_at=HELD_AT, options=("--time=60",), without="--signal")
    untold.wait_until_held()
    limit(cluster, untold, minutes=1)
    told.wait_until_held()
    hours, minutes, _ = cluster.show(told.jobs[0])["RunTime"].split(":")
    limit(cluster, told, minutes=60 * int(hours) + int(minutes) + 3)

    def go_on(job: Submitted) -> None:
        wait_for(lambda: "heard" if "death signal" in job.log else None, "SLURM sent no signal")
        job.release()
        job.wait_for_restart()
        limit(cluster, job, minutes=60)  # which the rest of the run may need where machines are slow

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(go_on, (told, untold)))
    return told, untold


def test_a_limit_that_comes_unannounced_saves_within_the_time_to_the_kill(
    limited: tuple[Submitted, Submitted], undisturbed: Submitted
) -> None:
    _, job = limited
    assert_goes_on(job, undisturbed)
    assert "SIGTERM" in job.ends()[0]["reason"]


def test_slurms_signal_before_a_limit_saves_in_time(
    limited: tuple[Submitted, Submitted], undisturbed: Submitted
) -> None:
    job, _ = limited
    assert_goes_on(job, undisturbed)
    assert "SIGUSR2" in job.ends()[0]["reason"]


def limit(cluster: Cluster, job: Submitted, minutes: int) -> None:
    cluster.run("scontrol", "update", f"JobId={job.jobs[0]}", f"TimeLimit={minutes}")


def assert_goes_on(job: Submitted, undisturbed: Submitted) -> None:
    assert_same_run(job, undisturbed)
    first, second = job.ends()
    assert (first["code"], first["decision"], second["decision"]) == (75, "restart", "done")
    assert second["start"] == first["progress"] > 0
