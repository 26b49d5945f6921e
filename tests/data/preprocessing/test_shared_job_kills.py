"""Workers of a shared job that die, are killed or suspended (data/preprocessing/worker_group.py)."""

import json
import os
import random
import shutil
import signal
import time

import pytest

from data.cache.manifest import read_manifest
from data.cache_layout import CREW
from data.preprocessing.run import preprocess
from data.preprocessing.worker_group import STALE_SECONDS
from tests.data.preprocessing.made_shared_job import PICTURES, QUIET, contents, inodes, write_numbered_triple
from tests.patience import PATIENCE
from tests.workers import start_worker


def without_scan(cache):
    """All but what is remembered of pictures."""
    return {name: data for name, data in contents(cache).items() if not name.startswith("scan/")}


MOMENTS = ["/scan/", "/crew/plan-", "/claims/constants@", "/claims/shards.", ".tar.", "/validation.part/0003"]


@pytest.mark.fault(25, "a dead worker's claim and half-written shard")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_dies_holds_nobody_up_and_leaves_nothing(job_of, pictures, undisturbed, tmp_path, moment):
    """Killed before it first makes a file of such a path, while others are there: the last of them clears up."""
    config = job_of(tmp_path / "cache", pictures)
    dying = start_worker(config, 1, 3, kill_at=moment, fate=signal.SIGSTOP)
    dying.wait_until_stopped()
    others = [start_worker(config, number, 3) for number in (0, 2)]
    deadline, joined = time.monotonic() + PATIENCE, set()
    while len(joined) < 3:
        joined.update((config.data.cache / CREW / "workers").glob("*.json"))  # one may be done before another is there
        assert time.monotonic() < deadline, "the others did not join"
        time.sleep(0.01)
    dying.kill()
    assert dying.join()[0] == -signal.SIGKILL
    assert [worker.join()[:2] for worker in others] == [(0, "")] * 2
    assert contents(config.data.cache) == undisturbed[0]


def test_what_the_last_worker_left_when_it_was_killed_the_next_clears_up(job_of, pictures, undisturbed, tmp_path):
    """Killed while it cleared up itself, over a complete cache: no shard is touched."""
    config = job_of(tmp_path / "cache", pictures)
    assert start_worker(config, kill_at=undisturbed[1] - 2).join()[0] == -signal.SIGKILL
    assert (config.data.cache / CREW).exists()
    shards = {path: inode for path, inode in inodes(config.data.cache).items() if path.suffix in (".tar", ".json")}
    preprocess(config, QUIET)
    assert contents(config.data.cache) == undisturbed[0]
    assert shards.items() <= inodes(config.data.cache).items()


def kill_and_run_again(config, undisturbed, *, at):
    cache = config.data.cache
    code, _, _ = start_worker(config, kill_at=at).join()
    assert code == -9, f"there is no change {at}"
    again = start_worker(config).join()
    assert again[:2] == (0, ""), f"killed before change {at}"
    assert contents(cache) == undisturbed[0], f"killed before change {at}"
    shutil.rmtree(cache)


@pytest.mark.parametrize("moment", range(4))
def test_a_killed_worker_is_gone_on_from(job_of, pictures, undisturbed, tmp_path, moment):
    """Before a change of the cache, drawn by seed: to within a quarter of the job each."""
    at = random.Random(moment).uniform(moment / 4, (moment + 1) / 4)
    kill_and_run_again(job_of(tmp_path / "cache", pictures), undisturbed, at=1 + int(at * (undisturbed[1] - 1)))


@pytest.mark.slow
def test_a_worker_killed_at_twenty_random_moments_is_gone_on_from(job_of, pictures, undisturbed, tmp_path):
    for at in sorted(random.Random(4).sample(range(1, undisturbed[1] + 1), 20)):
        kill_and_run_again(job_of(tmp_path / f"cache-{at}", pictures), undisturbed, at=at)


def test_killed_again_and_again_it_is_done_in_the_end(job_of, pictures, undisturbed, tmp_path):
    """By the clock, at whatever instruction it is; what was finished is never made again."""
    config, cache = job_of(tmp_path / "cache", pictures), tmp_path / "cache"
    moments, finished = random.Random(7), {}
    for _ in range(4):
        worker = start_worker(config)
        time.sleep(moments.uniform(0.3, 1.2))
        worker.kill()
        worker.join()
        now = {path: inode for path, inode in inodes(cache).items() if path.suffix == ".index"}
        assert finished.items() <= now.items()
        finished = now
    assert start_worker(config).join()[:2] == (0, "")
    assert contents(cache) == undisturbed[0]


def test_a_worker_that_was_killed_elsewhere_is_not_followed_while_it_passes_for_living(
    job_of, pictures, tmp_path, monkeypatch
):
    """Pictures were added meanwhile."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    config = job_of(tmp_path / "cache", folder)
    assert start_worker(config, kill_at=60).join()[0] == -9
    group = config.data.cache / CREW
    assert list(group.glob("plan-*"))
    for file in (group / "workers").iterdir():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"place": "another machine"}))
    monkeypatch.setattr("data.preprocessing.worker_group.STALE_SECONDS", 3)
    write_numbered_triple(folder, PICTURES)
    preprocess(config, QUIET)
    assert read_manifest(config.data.cache).samples["noise"]["train"] == PICTURES + 1 - 6


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_was_suspended_for_minutes_changes_nothing_when_it_wakes(job_of, pictures, tmp_path, moment):
    """Others have planned anew since, with a picture more. Stopped before it first makes a file of such a path."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    config = job_of(tmp_path / "cache", folder)
    worker = start_worker(config, kill_at=moment, fate=signal.SIGSTOP)
    worker.wait_until_stopped()
    for file in (config.data.cache / CREW / "workers").glob("*.json"):
        os.utime(file, (time.time() - STALE_SECONDS - 1,) * 2)
    write_numbered_triple(folder, PICTURES)
    preprocess(config, QUIET)
    before = without_scan(config.data.cache)
    worker.go_on()
    code, message, _ = worker.join()
    assert code == 2 and "was taken for dead" in message, f"{code} {message}"
    assert without_scan(config.data.cache) == before
    assert read_manifest(config.data.cache).samples["noise"]["train"] == PICTURES + 1 - 6
