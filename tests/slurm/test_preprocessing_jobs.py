"""Preprocessing as an array of jobs on a real SLURM, and training that waits for it."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.data.made_caches import stored_shards
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import Submitted

if TYPE_CHECKING:
    from data.cache.open_cache import Cache

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_an_array_of_which_a_task_is_killed_makes_the_cache_of_one_process_and_then_trains(
    submit: Callable[..., Submitted], cache: "Cache", tmp_path: Path, cluster: Cluster
) -> None:
    train = ("train.steps=2", "train.warmup_steps=1", "slurm.nodes=1")
    made = tmp_path / "cache"
    given = (f"data.cache={made}", "data.encode_batch_size=4", *train)
    job = submit("preprocessed", "--with-preprocess", *given, hold_at="/claims/shards.")  # before a shard is taken
    array, rest, training = job.jobs
    os.kill(int(wait_for(lambda: last_tasks_worker(job), "the last task did not start")), signal.SIGKILL)
    job.release()

    assert cluster.wait(array) == "COMPLETED", "the task that was killed has started again"
    assert cluster.wait(rest) == "COMPLETED"
    assert cluster.wait(training) == "COMPLETED", job.log
    restarts = [task.rpartition("Restarts=")[2].split()[0] for task in tasks_of(cluster, array)]
    assert sorted(restarts) == ["0", "0", "0", "1"], "of four tasks one"
    assert stored_shards(made) == stored_shards(cache.folder)
    assert (made / "manifest.json").read_bytes() == (cache.folder / "manifest.json").read_bytes()


def last_tasks_worker(job: Submitted) -> str | None:
    """The process id of the array's last task. Its job id is also the array's, and to requeue that starts all again."""
    for pid in job.processes("data.preprocess"):
        with suppress(OSError):  # it has ended
            if "SLURM_ARRAY_TASK_ID=3" in Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"):
                return str(pid)
    return None


def tasks_of(cluster: Cluster, array: str) -> list[str]:
    return cluster.run("scontrol", "show", "job", "--oneliner", array).splitlines()
