"""Several workers on one cache, alive, dead and late. Forked from a warm server, or as threads of this process."""

import json
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from rich.console import Console
from safetensors.torch import load

import data.preprocessing.job
import data.preprocessing.run
import data.preprocessing.write_shards
import data.samples.decode
from configs.errors import InputError
from data.cache.manifest import read_manifest, read_shard_table
from data.cache.open_cache import open_cache
from data.cache_layout import CREW, SCAN
from data.encoders.model_folder import encoder_fingerprints
from data.preprocessing.job import Job
from data.preprocessing.run import preprocess
from data.preprocessing.share_plan import agree_on_plan
from data.preprocessing.worker import Worker
from data.preprocessing.worker_group import STALE_SECONDS, join
from tests.workers import start_worker

QUIET = Console(quiet=True)
PICTURES = 56


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of triples of noise, 32 px, each with a caption of its own; five shards or more. Read only."""
    folder = tmp_path_factory.mktemp("workers") / "pictures"
    for number in range(PICTURES):
        write_triple(folder, number)
    return folder


def write_triple(folder, number, *, hole=(8, 8, 20, 24)):
    mask = Image.new("L", (32, 32))
    mask.paste(255, hole)
    noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for role, picture in (("target", Image.fromarray(noise)), ("mask", mask)):
        (folder / role).mkdir(parents=True, exist_ok=True)
        picture.save(folder / role / f"picture-{number:02d}.png")
    (folder / "target" / f"picture-{number:02d}.txt").write_text(f"noise number {number}")


@pytest.fixture(scope="module")
def config_of(demo_config):
    """Makes a config: `config_of(cache, folder, *overrides)`. Texts take 64 KiB each, so 16 samples fill a shard."""

    def make(cache, folder, *overrides):
        datasets = [f"data.datasets=[{{name: noise, target: {folder}/target, mask: {folder}/mask}}]"]
        sizes = ["data.resolution=32", "data.holdout=6", "data.captions.text_length=512", "data.shard_size_mib=1"]
        return demo_config(cache, *datasets, *sizes, "data.encode_batch_size=2", *overrides)

    return make


@pytest.fixture(scope="module")
def undisturbed(config_of, pictures, tmp_path_factory):
    """(files of the cache that one worker made alone, how often it changed the folder)."""
    config = config_of(tmp_path_factory.mktemp("undisturbed") / "cache", pictures)
    code, message, changes = start_worker(config).join()
    assert (code, message) == (0, "")
    files = contents(config.data.cache)
    assert len([name for name in files if name.endswith(".tar")]) >= 5
    return files, changes


def contents(cache):
    """Every file of a cache as bytes; shards.npz as its columns, as a zip holds the time of day."""
    files = {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and path.name != "shards.npz"
    }
    table = read_shard_table(cache)
    return files | {"shards.npz": [column.tolist() for column in vars(table).values()]}


def without_scan(cache):
    """All but what is remembered of pictures."""
    return {name: data for name, data in contents(cache).items() if not name.startswith("scan/")}


def inodes(cache):
    return {path: path.stat().st_ino for path in cache.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _loaded_by_one_thread_at_a_time(monkeypatch):
    """As transformers changes global state while it loads; workers are processes otherwise."""
    lock, load = threading.Lock(), data.preprocessing.run.load_encoders

    def load_alone(*arguments, **options):
        with lock:
            return load(*arguments, **options)

    monkeypatch.setattr(data.preprocessing.run, "load_encoders", load_alone)


@pytest.fixture
def in_threads(monkeypatch):
    """Workers of one process, one for each config, of which none plans before all have joined; what each of them
    raised, or None."""

    def run(configs):
        all_joined, agree_on_plan = threading.Barrier(len(configs), timeout=120), data.preprocessing.run.agree_on_plan

        def agree_when_all_joined(*arguments, **options):
            all_joined.wait()
            return agree_on_plan(*arguments, **options)

        def work(number):
            try:
                preprocess(configs[number], QUIET, Worker(number, len(configs)))
            except InputError as error:
                return str(error)
            return None

        with monkeypatch.context() as patch, ThreadPoolExecutor(len(configs)) as pool:
            patch.setattr(data.preprocessing.run, "agree_on_plan", agree_when_all_joined)
            return list(pool.map(work, range(len(configs))))

    return run


def test_three_workers_at_once_make_what_one_makes(config_of, pictures, undisturbed, tmp_path):
    config = config_of(tmp_path / "cache", pictures)
    workers = [start_worker(config, number, 3) for number in range(3)]
    assert [worker.join()[:2] for worker in workers] == [(0, "")] * 3
    assert contents(config.data.cache) == undisturbed[0]


def test_one_of_several_plans_and_each_sample_is_encoded_once(
    config_of, pictures, undisturbed, tmp_path, monkeypatch, in_threads
):
    planned, encoded = [], []
    plan_samples, describe = data.preprocessing.job.plan_samples, data.preprocessing.write_shards.describe_sample
    monkeypatch.setattr(
        "data.preprocessing.job.plan_samples", lambda *a, **k: planned.append(1) or plan_samples(*a, **k)
    )
    monkeypatch.setattr(
        "data.preprocessing.write_shards.describe_sample", lambda s: encoded.append(s.triple.key) or describe(s)
    )
    config = config_of(tmp_path / "cache", pictures)
    assert in_threads([config] * 4) == [None] * 4
    assert len(planned) == 1
    assert len(encoded) == len(set(encoded)) == PICTURES
    assert contents(config.data.cache) == undisturbed[0]


MOMENTS = ["/scan/", "/crew/plan-", "/claims/constants@", "/claims/shards.", ".tar.", "/validation.part/0003"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_dies_holds_nobody_up_and_leaves_nothing(config_of, pictures, undisturbed, tmp_path, moment):
    """Killed before it first makes a file of such a path, while others are there: the last of them clears up."""
    config = config_of(tmp_path / "cache", pictures)
    dying = start_worker(config, 1, 3, kill_at=moment, fate=signal.SIGSTOP)
    dying.wait_until_stopped()
    others = [start_worker(config, number, 3) for number in (0, 2)]
    deadline = time.monotonic() + 120
    while len(list((config.data.cache / CREW / "workers").glob("*.json"))) < 3:
        assert time.monotonic() < deadline, "the others did not join"
        time.sleep(0.01)
    dying.kill()
    assert dying.join()[0] == -signal.SIGKILL
    assert [worker.join()[:2] for worker in others] == [(0, "")] * 2
    assert contents(config.data.cache) == undisturbed[0]


def test_what_the_last_worker_left_when_it_was_killed_the_next_clears_up(config_of, pictures, undisturbed, tmp_path):
    """Killed while it cleared up itself, over a complete cache: no shard is touched."""
    config = config_of(tmp_path / "cache", pictures)
    assert start_worker(config, kill_at=undisturbed[1] - 2).join()[0] == -signal.SIGKILL
    assert (config.data.cache / CREW).exists()
    shards = {path: inode for path, inode in inodes(config.data.cache).items() if path.suffix in (".tar", ".json")}
    preprocess(config, QUIET)
    assert contents(config.data.cache) == undisturbed[0]
    assert shards.items() <= inodes(config.data.cache).items()


def test_the_tasks_of_an_array_may_run_one_after_the_other(config_of, pictures, undisturbed, tmp_path):
    config = config_of(tmp_path / "cache", pictures)
    preprocess(config, QUIET, Worker(2, 3))
    before = inodes(config.data.cache)
    assert contents(config.data.cache) == undisturbed[0]
    for number in (0, 1):
        preprocess(config, QUIET, Worker(number, 3))
    assert inodes(config.data.cache) == before


def kill_and_run_again(config, undisturbed, *, at):
    cache = config.data.cache
    code, _, _ = start_worker(config, kill_at=at).join()
    assert code == -9, f"there is no change {at}"
    again = start_worker(config).join()
    assert again[:2] == (0, ""), f"killed before change {at}"
    assert contents(cache) == undisturbed[0], f"killed before change {at}"
    shutil.rmtree(cache)


@pytest.mark.parametrize("moment", range(4))
def test_a_killed_worker_is_gone_on_from(config_of, pictures, undisturbed, tmp_path, moment):
    """Before a change of the cache, drawn by seed: to within a quarter of the job each."""
    at = random.Random(moment).uniform(moment / 4, (moment + 1) / 4)
    kill_and_run_again(config_of(tmp_path / "cache", pictures), undisturbed, at=1 + int(at * (undisturbed[1] - 1)))


@pytest.mark.slow
def test_a_worker_killed_at_twenty_random_moments_is_gone_on_from(config_of, pictures, undisturbed, tmp_path):
    for at in sorted(random.Random(4).sample(range(1, undisturbed[1] + 1), 20)):
        kill_and_run_again(config_of(tmp_path / f"cache-{at}", pictures), undisturbed, at=at)


def test_killed_again_and_again_it_is_done_in_the_end(config_of, pictures, undisturbed, tmp_path):
    """By the clock, at whatever instruction it is; what was finished is never made again."""
    config, cache = config_of(tmp_path / "cache", pictures), tmp_path / "cache"
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


def test_only_changed_shards_are_made_anew_by_several_workers(config_of, pictures, tmp_path, in_threads):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    config = config_of(tmp_path / "cache", folder)
    preprocess(config, QUIET)
    before = {path: inode for path, inode in inodes(config.data.cache).items() if path.suffix == ".tar"}
    write_triple(folder, 7, hole=(0, 0, 5, 5))
    (folder / "target" / "picture-09.txt").write_text("another caption")
    for path in folder.glob("*/picture-11.*"):
        path.unlink()
    assert in_threads([config] * 3) == [None] * 3
    after = {path: inode for path, inode in inodes(config.data.cache).items() if path.suffix == ".tar"}
    kept = before.items() & after.items()
    assert 2 <= len(kept) < len(before)
    alone = config_of(tmp_path / "alone", folder)
    preprocess(alone, QUIET)
    assert contents(config.data.cache) == contents(alone.data.cache)


def test_a_bad_picture_is_told_by_every_worker_and_found_by_one(config_of, pictures, tmp_path, monkeypatch, in_threads):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    bad = folder / "target" / "picture-05.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    seen, load_pixels = [], data.samples.decode.load_pixels
    monkeypatch.setattr(
        "data.samples.decode.load_pixels", lambda sample, c: seen.append(sample.triple.name) or load_pixels(sample, c)
    )
    config = config_of(tmp_path / "cache", folder)
    messages = in_threads([config] * 3)
    assert all(message and f"{bad}: cannot be decoded" in message for message in messages), messages
    assert seen.count("picture-05") == 1
    assert not (config.data.cache / CREW).exists()

    bad.write_bytes(whole)
    assert in_threads([config] * 2) == [None] * 2
    open_cache(config, Path(config.model.base))


def test_bad_input_is_found_by_one_and_told_by_all(config_of, pictures, tmp_path, monkeypatch, in_threads):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "mask" / "picture-03.png").unlink()
    planned, plan_samples = [], data.preprocessing.job.plan_samples
    monkeypatch.setattr(
        "data.preprocessing.job.plan_samples", lambda *a, **k: planned.append(1) or plan_samples(*a, **k)
    )
    config = config_of(tmp_path / "cache", folder)
    messages = in_threads([config] * 3)
    assert all(message and "picture-03.png: no mask of the same name" in message for message in messages), messages
    assert len(planned) == 1
    assert {path.name for path in config.data.cache.iterdir()} == {SCAN}, "what is sound need not be read again"


@pytest.mark.parametrize("fault", [FileNotFoundError("copies/a.part"), InputError("a.png: no such picture")])
def test_who_helps_to_plan_goes_on_when_the_job_is_done_first(tmp_path, fault):
    """Then what the helper still writes may go while it writes."""
    with join(tmp_path / "crew", {}) as planner, join(tmp_path / "crew", {}) as helper:
        assert planner.claim("plan")

        def help_planning():
            planner.release("plan")
            raise fault

        assert agree_on_plan(helper, lambda: [], help_planning=help_planning, waiting=print).specs == ()


def test_a_job_of_another_config_is_refused_and_the_first_goes_on(config_of, pictures, undisturbed, tmp_path):
    config = config_of(tmp_path / "cache", pictures)
    job = Job(config, Path(config.model.base), encoder_fingerprints(Path(config.model.base)))
    with join(config.data.cache / CREW, job.settings):
        other = config_of(tmp_path / "cache", pictures, "data.resolution=[48]", "data.encode_batch_size=4")
        with pytest.raises(InputError, match=r"another job .*process \d+ on") as caught:
            preprocess(other, QUIET)
        assert "data.resolution is [48] here, [32] there" in str(caught.value)
        assert "encode_batch_size" not in str(caught.value)
        # Where the encoders run and how pictures are weighed is each worker's own affair.
        same = config_of(tmp_path / "cache", pictures, "data.encoders.t5=cpu", "data.captions.dropout=0.5")
        preprocess(same, QUIET, Worker(1, 2))
    assert contents(config.data.cache) == undisturbed[0]


def test_pictures_that_change_between_two_jobs_are_planned_anew(config_of, pictures, tmp_path):
    """What a dead worker planned is of its time."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    config = config_of(tmp_path / "cache", folder)
    assert start_worker(config, kill_at=60).join()[0] == -9
    assert list((config.data.cache / CREW).glob("plan-*"))
    write_triple(folder, 1, hole=(0, 0, 30, 30))
    preprocess(config, QUIET)
    alone = config_of(tmp_path / "alone", folder)
    preprocess(alone, QUIET)
    assert contents(config.data.cache) == contents(alone.data.cache)


def test_a_worker_that_was_killed_elsewhere_is_not_followed_while_it_passes_for_living(
    config_of, pictures, tmp_path, monkeypatch
):
    """Pictures were added meanwhile."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    config = config_of(tmp_path / "cache", folder)
    assert start_worker(config, kill_at=60).join()[0] == -9
    group = config.data.cache / CREW
    assert list(group.glob("plan-*"))
    for file in (group / "workers").iterdir():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"place": "another machine"}))
    monkeypatch.setattr("data.preprocessing.worker_group.STALE_SECONDS", 3)
    write_triple(folder, PICTURES)
    preprocess(config, QUIET)
    assert read_manifest(config.data.cache).samples["noise"]["train"] == PICTURES + 1 - 6


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_was_suspended_for_minutes_changes_nothing_when_it_wakes(config_of, pictures, tmp_path, moment):
    """Others have planned anew since, with a picture more. Stopped before it first makes a file of such a path."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    config = config_of(tmp_path / "cache", folder)
    worker = start_worker(config, kill_at=moment, fate=signal.SIGSTOP)
    worker.wait_until_stopped()
    for file in (config.data.cache / CREW / "workers").glob("*.json"):
        os.utime(file, (time.time() - STALE_SECONDS - 1,) * 2)
    write_triple(folder, PICTURES)
    preprocess(config, QUIET)
    before = without_scan(config.data.cache)
    worker.go_on()
    code, message, _ = worker.join()
    assert code == 2 and "was taken for dead" in message, f"{code} {message}"
    assert without_scan(config.data.cache) == before
    assert read_manifest(config.data.cache).samples["noise"]["train"] == PICTURES + 1 - 6


@pytest.mark.parametrize("batch_size", [1, 7])
def test_tensors_are_the_same_whatever_the_batch_size(config_of, pictures, undisturbed, tmp_path, batch_size):
    """One step of bf16 at most, where rounding fell the other way."""
    config = config_of(tmp_path / "cache", pictures, f"data.encode_batch_size={batch_size}")
    preprocess(config, QUIET)
    manifest = read_manifest(config.data.cache)
    assert manifest.samples == {"noise": {"train": PICTURES - 6, "holdout": 6}}
    compared = 0
    for name, expected in undisturbed[0].items():
        if name.endswith(".tar"):
            compared += compare_tars(tmp_path / "expected.tar", expected, config.data.cache / name)
    assert compared == 4 * PICTURES


def compare_tars(copy, expected, tar):
    """Number of tensors that two shards have in common, bit by bit or to one step of bf16."""
    copy.write_bytes(expected)
    compared = 0
    pairs = zip(*(webdataset.WebDataset(str(path), shardshuffle=False) for path in (copy, tar)), strict=True)
    for one, other in pairs:
        assert one.keys() == other.keys()
        for member in one:
            if member == "json":
                assert one[member] == other[member]
            if not member.endswith("safetensors"):
                continue
            for kind, tensor in load(one[member]).items():
                found = load(other[member])[kind]
                if tensor.dtype != torch.bfloat16:
                    assert torch.equal(found, tensor)
                    continue
                # Neighbouring bf16 numbers of one sign are neighbouring integers.
                steps = (found.view(torch.int16).int() - tensor.view(torch.int16).int()).abs()
                near_zero = (found.float() - tensor.float()).abs() <= 1e-5
                assert (near_zero | (steps <= 1)).all()
                compared += 1
    return compared
