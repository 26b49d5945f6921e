"""Several workers on one cache, alive, dead and late. Forked from a warm server, or as threads of this process."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import load

import data.preprocessing.job
import data.preprocessing.run
import data.preprocessing.write_shards
import data.samples.decode
from configs.errors import InputError
from data.cache.manifest import read_manifest
from data.cache.open_cache import open_cache
from data.cache_layout import CREW, SCAN
from data.encoders.model_folder import encoder_fingerprints
from data.preprocessing.job import Job
from data.preprocessing.run import preprocess
from data.preprocessing.share_plan import agree_on_plan
from data.preprocessing.worker import Worker
from data.preprocessing.worker_group import join
from tests.data.preprocessing.made_shared_job import PICTURES, QUIET, contents, inodes, write_numbered_triple
from tests.patience import PATIENCE
from tests.workers import start_worker


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
        all_joined = threading.Barrier(len(configs), timeout=PATIENCE)
        agree_on_plan = data.preprocessing.run.agree_on_plan

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


def test_three_workers_at_once_make_what_one_makes(job_of, pictures, undisturbed, tmp_path):
    config = job_of(tmp_path / "cache", pictures)
    workers = [start_worker(config, number, 3) for number in range(3)]
    assert [worker.join()[:2] for worker in workers] == [(0, "")] * 3
    assert contents(config.data.cache) == undisturbed[0]


def test_one_of_several_plans_and_each_sample_is_encoded_once(
    job_of, pictures, undisturbed, tmp_path, monkeypatch, in_threads
):
    planned, encoded = [], []
    plan_samples, describe = data.preprocessing.job.plan_samples, data.preprocessing.write_shards.describe_sample
    monkeypatch.setattr(
        "data.preprocessing.job.plan_samples", lambda *a, **k: planned.append(1) or plan_samples(*a, **k)
    )
    monkeypatch.setattr(
        "data.preprocessing.write_shards.describe_sample", lambda s: encoded.append(s.triple.key) or describe(s)
    )
    config = job_of(tmp_path / "cache", pictures)
    assert in_threads([config] * 4) == [None] * 4
    assert len(planned) == 1
    assert len(encoded) == len(set(encoded)) == PICTURES
    assert contents(config.data.cache) == undisturbed[0]


def test_the_tasks_of_an_array_may_run_one_after_the_other(job_of, pictures, undisturbed, tmp_path):
    config = job_of(tmp_path / "cache", pictures)
    preprocess(config, QUIET, Worker(2, 3))
    before = inodes(config.data.cache)
    assert contents(config.data.cache) == undisturbed[0]
    for number in (0, 1):
        preprocess(config, QUIET, Worker(number, 3))
    assert inodes(config.data.cache) == before


def test_only_changed_shards_are_made_anew_by_several_workers(job_of, pictures, tmp_path, in_threads):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    config = job_of(tmp_path / "cache", folder)
    preprocess(config, QUIET)
    before = {path: inode for path, inode in inodes(config.data.cache).items() if path.suffix == ".tar"}
    write_numbered_triple(folder, 7, hole=(0, 0, 5, 5))
    (folder / "target" / "picture-09.txt").write_text("another caption")
    for path in folder.glob("*/picture-11.*"):
        path.unlink()
    assert in_threads([config] * 3) == [None] * 3
    after = {path: inode for path, inode in inodes(config.data.cache).items() if path.suffix == ".tar"}
    kept = before.items() & after.items()
    assert 2 <= len(kept) < len(before)
    alone = job_of(tmp_path / "alone", folder)
    preprocess(alone, QUIET)
    assert contents(config.data.cache) == contents(alone.data.cache)


def test_a_bad_picture_is_told_by_every_worker_and_found_by_one(job_of, pictures, tmp_path, monkeypatch, in_threads):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    bad = folder / "target" / "picture-05.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    seen, load_pixels = [], data.samples.decode.load_pixels
    monkeypatch.setattr(
        "data.samples.decode.load_pixels", lambda sample, c: seen.append(sample.triple.name) or load_pixels(sample, c)
    )
    config = job_of(tmp_path / "cache", folder)
    messages = in_threads([config] * 3)
    assert all(message and f"{bad}: cannot be decoded" in message for message in messages), messages
    assert seen.count("picture-05") == 1
    assert not (config.data.cache / CREW).exists()

    bad.write_bytes(whole)
    assert in_threads([config] * 2) == [None] * 2
    open_cache(config, Path(config.model.base))


def test_bad_input_is_found_by_one_and_told_by_all(job_of, pictures, tmp_path, monkeypatch, in_threads):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "mask" / "picture-03.png").unlink()
    planned, plan_samples = [], data.preprocessing.job.plan_samples
    monkeypatch.setattr(
        "data.preprocessing.job.plan_samples", lambda *a, **k: planned.append(1) or plan_samples(*a, **k)
    )
    config = job_of(tmp_path / "cache", folder)
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


def test_a_job_of_another_config_is_refused_and_the_first_goes_on(job_of, pictures, undisturbed, tmp_path):
    config = job_of(tmp_path / "cache", pictures)
    job = Job(config, Path(config.model.base), encoder_fingerprints(Path(config.model.base)))
    with join(config.data.cache / CREW, job.settings):
        other = job_of(tmp_path / "cache", pictures, "data.resolution=[48]", "data.encode_batch_size=4")
        with pytest.raises(InputError, match=r"another job .*process \d+ on") as caught:
            preprocess(other, QUIET)
        assert "data.resolution is [48] here, [32] there" in str(caught.value)
        assert "encode_batch_size" not in str(caught.value)
        # Where the encoders run and how pictures are weighed is each worker's own affair.
        same = job_of(tmp_path / "cache", pictures, "data.encoders.t5=cpu", "data.captions.dropout=0.5")
        preprocess(same, QUIET, Worker(1, 2))
    assert contents(config.data.cache) == undisturbed[0]


def test_pictures_that_change_between_two_jobs_are_planned_anew(job_of, pictures, tmp_path):
    """What a dead worker planned is of its time."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    config = job_of(tmp_path / "cache", folder)
    assert start_worker(config, kill_at=60).join()[0] == -9
    assert list((config.data.cache / CREW).glob("plan-*"))
    write_numbered_triple(folder, 1, hole=(0, 0, 30, 30))
    preprocess(config, QUIET)
    alone = job_of(tmp_path / "alone", folder)
    preprocess(alone, QUIET)
    assert contents(config.data.cache) == contents(alone.data.cache)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_tensors_are_the_same_whatever_the_batch_size(job_of, pictures, undisturbed, tmp_path, batch_size):
    """One step of bf16 at most, where rounding fell the other way."""
    config = job_of(tmp_path / "cache", pictures, f"data.encode_batch_size={batch_size}")
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
