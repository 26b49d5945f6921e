"""Training jobs on a real SLURM that cannot train: what is wrong is said once, and a restart would not mend it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


def assert_refused(job: Submitted, words: str) -> None:
    """It has ended for good with exit code 2, and the last line of its log says why."""
    assert job.finish() == "FAILED"
    told = job.cluster.show(job.jobs[0])
    assert (told["ExitCode"], told["Restarts"]) == ("2:0", "0")
    assert words in job.log.splitlines()[-1]
    assert not (job.run / "metrics.jsonl").exists()


def test_a_key_that_does_not_exist(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    """`fluxfill slurm submit` would have said so before; plain sbatch cannot."""
    # Of a locale that the machine lacks bash would complain in the log.
    given = f"--export=ALL,LC_ALL=C.UTF-8,CONFIG={config_file}"
    options = [f"--output={tmp_path}/wrong-%j.log", "--cpus-per-task=2", given]
    words = ["slurm/train.sbatch", f"run.dir={tmp_path}", "train.learning_rate=1e-4"]
    id = cluster.run("sbatch", "--parsable", *options, *words, cwd=ROOT).strip()
    job = Submitted(cluster, tmp_path / "wrong", [id])
    assert_refused(job, "train.learning_rate is 0.0001, but there is no such key. Did you mean train.lr?")
    assert len(job.log.splitlines()) == 1


def test_a_cache_that_is_not_finished_though_the_job_was_to_wait_for_it(
    submit: Callable[..., Submitted], tmp_path: Path
) -> None:
    """A dependency on a job that the controller does not know any more counts as fulfilled."""
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    job = submit("forgotten", f"data.cache={tmp_path}/cache", options=("--dependency=afterok:1",))
    assert_refused(job, f"{tmp_path}/cache")


def test_nodes_that_do_not_find_each_other_never_train_alone(submit: Callable[..., Submitted]) -> None:
    assert_refused(submit("strangers", "slurm.interface=null"), "Set slurm.interface")


def test_gpus_that_slurm_may_deal_out_unevenly(submit: Callable[..., Submitted]) -> None:
    job = submit("uneven", options=("--gpus=4",), without="--gpus-per-node")
    assert_refused(job, "Give --gpus-per-node")


def test_a_job_that_comes_no_further_stops_and_says_so(submit: Callable[..., Submitted], cluster: Cluster) -> None:
    """Its ranks fail before they have met: a node that has not failed itself is told."""
    job = submit("hopeless", "slurm.env={GLOO_SOCKET_IFNAME: nowhere}", "slurm.max_restarts=1")
    job.wait_for_restart()
    assert job.finish() == "FAILED"
    assert cluster.show(job.jobs[0])["Restarts"] == "1"
    assert [end["decision"] for end in job.ends()] == ["restart", "stop"]
    assert "2 starts in a row came no further than 0" in job.log
