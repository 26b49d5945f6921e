import json
import multiprocessing
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import InputError
from data.cache.shard_index import read_index
from data.cache_layout import CREW, EMPTY_TEXT, MANIFEST, SHARD_TABLE, index_path
from data.preprocessing.run import preprocess
from data.preprocessing.worker_group import join
from data.verify.cache import CheckedCache, verify_cache
from data.verify.repair import refuse_other_config, repair_cache

QUIET = Console(quiet=True)


@pytest.fixture
def config(cache, demo_config, tmp_path):
    """A config whose cache may be damaged."""
    shutil.copytree(cache.folder, tmp_path / "cache")
    return demo_config(tmp_path / "cache")


def verify(folder: Path) -> CheckedCache:
    return verify_cache(folder, threads=2, start=lambda _: None, advance=lambda _: None)


def repair(config) -> tuple[CheckedCache, list[str]]:
    return repair_cache(config, partial(verify, config.data.cache), QUIET)


def stored(folder: Path) -> dict[str, bytes]:
    """All of a cache but what repairing adds."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "quarantine" not in path.relative_to(folder).parts[0]
    }


def quarantined(folder: Path) -> dict[str, bytes]:
    """Path that a file had -> its bytes."""
    files = [path for path in sorted((folder / "quarantine").rglob("*")) if path.is_file()]
    return {"/".join(path.relative_to(folder / "quarantine").parts[1:]): path.read_bytes() for path in files}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def flip(tar: Path, row: int) -> None:
    data = bytearray(tar.read_bytes())
    data[int(read_index(index_path(tar)).latents[row, 0]) + 300] ^= 1
    tar.write_bytes(data)


def test_a_whole_cache_passes(cache):
    assert verify(cache.folder).problems == []


def test_a_bad_shard_is_moved_aside_and_encoded_again_to_the_same_bytes(config, cache):
    folder = config.data.cache
    whole = stored(folder)
    bad, cut = str(cache.table.path[0]), str(cache.table.path[-1])
    flip(folder / bad, row=1)
    (folder / cut).write_bytes((folder / cut).read_bytes()[:5000])
    damaged = {path: (folder / path).read_bytes() for path in (bad, cut)}
    checked, changed = repair(config)
    assert checked.bad == sorted([bad, cut]) and changed == []
    assert stored(folder) == whole
    assert verify(folder).problems == []
    aside = quarantined(folder)
    assert {path: aside[path] for path in (bad, cut)} == damaged
    assert aside.keys() == {bad, cut, bad.replace(".tar", ".index"), cut.replace(".tar", ".index")}
    said = {(record["shard"], record["member"]): record for record in records(folder)}
    key = read_index(index_path(folder / bad)).keys[1]
    record = said[bad, f"{key}.safetensors"]
    assert record["why"] == "does not match its checksum"
    assert (folder / record["moved_to"]).read_bytes() == damaged[bad]
    assert record["when"].endswith("+00:00")


def test_a_lost_index_is_rebuilt_without_sources_or_model(config, cache, monkeypatch):
    folder = config.data.cache
    whole = stored(folder)
    lost, broken = (index_path(folder / str(path)) for path in cache.table.path[:2])
    lost.unlink()
    broken.write_bytes(b"<html>")
    monkeypatch.setattr("data.verify.repair.preprocess", None)  # calling it would fail
    repair(config)
    assert stored(folder) == whole
    assert quarantined(folder) == {broken.relative_to(folder).as_posix(): b"<html>"}


def test_constants_pictures_and_head_are_made_again(config, cache):
    folder = config.data.cache
    whole = stored(folder)
    picture = next(path for path in (folder / "validation").iterdir() if path.suffix == ".png")
    for path in (folder / EMPTY_TEXT, folder / MANIFEST, picture):
        path.write_bytes(path.read_bytes()[:-9] + b"\0" * 9)
    (folder / SHARD_TABLE).unlink()
    damaged, _ = repair(config)
    assert MANIFEST in damaged.bad and SHARD_TABLE in damaged.bad
    after = stored(folder)
    assert after == whole
    assert verify(folder).problems == []


def test_a_picture_alone_is_made_again(config):
    folder = config.data.cache
    whole = stored(folder)
    picture = next(path for path in sorted((folder / "validation").iterdir()) if path.suffix == ".png")
    picture.write_bytes(picture.read_bytes()[:-1])
    checked, _ = repair(config)
    assert checked.bad == [picture.relative_to(folder).as_posix()]
    assert stored(folder) == whole


def test_preprocess_alone_notices_a_damaged_constant(config):
    folder = config.data.cache
    whole = stored(folder)
    flipped = bytearray(whole[EMPTY_TEXT])
    flipped[-7] ^= 1
    for damaged in (b"damaged", bytes(flipped)):
        (folder / EMPTY_TEXT).write_bytes(damaged)
        preprocess(config, QUIET)
        assert stored(folder) == whole


def test_a_tar_of_an_interrupted_job_without_index_is_moved_not_overwritten(config, cache):
    folder = config.data.cache
    whole = stored(folder)
    half = folder / str(cache.table.path[0])
    (folder / MANIFEST).unlink()
    index_path(half).unlink()
    repair(config)
    assert stored(folder) == whole
    assert set(quarantined(folder)) == {str(cache.table.path[0])}


def test_another_config_is_refused_before_anything_is_moved(config, demo_config, tmp_path):
    before = stored(config.data.cache)
    with pytest.raises(InputError, match=r"--repair: data.cache is .*elsewhere, not .*Give the config of this cache"):
        refuse_other_config(demo_config(tmp_path / "elsewhere"), config.data.cache)
    with pytest.raises(InputError, match=r"data.captions.text_length is 16, the cache was made with 32"):
        refuse_other_config(demo_config(config.data.cache, "data.captions.text_length=16"), config.data.cache)
    refuse_other_config(config, config.data.cache)
    assert stored(config.data.cache) == before


def test_lost_pictures_leave_the_bad_shard_in_quarantine_and_the_rest_alone(config, cache, demo_config, tmp_path):
    folder = config.data.cache
    bad = str(cache.table.path[0])
    flip(folder / bad, row=0)
    damaged = (folder / bad).read_bytes()
    gone = demo_config(folder, f"data.datasets.0.target={tmp_path}/gone")
    with pytest.raises(InputError, match="gone does not exist"):
        repair(gone)
    assert quarantined(folder)[bad] == damaged
    assert verify(folder).bad == [bad]
    repair(config)
    assert verify(folder).problems == []


def _die_at(step: int, config):
    """Repair, in a process that dies ahead of the given one of its renames and deletions."""
    left = iter(range(step, -1, -1))

    def dying(name):
        real = getattr(Path, name)

        def act(path, *arguments, **options):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *arguments, **options)

        setattr(Path, name, act)

    for name in ("rename", "replace", "unlink", "rmdir"):
        dying(name)
    repair(config)


@pytest.mark.parametrize("step", range(1, 8))
def test_a_repair_killed_at_any_step_is_judged_rightly_and_completed(config, cache, step):
    folder = config.data.cache
    whole = stored(folder)
    bad, rebuilt = str(cache.table.path[0]), str(cache.table.path[1])
    flip(folder / bad, row=0)
    index_path(folder / rebuilt).write_bytes(b"<html>")
    damaged = (folder / bad).read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_die_at, args=(step, config))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert verify(folder).problems, "a cache in the middle of its repair passed"
    preprocess(config, QUIET)
    repair(config)
    assert verify(folder).problems == []
    assert stored(folder) == whole
    assert damaged in quarantined(folder).values(), "the damaged shard is gone"


def test_a_repair_and_a_preprocess_keep_out_of_each_others_way(config):
    folder = config.data.cache
    (folder / EMPTY_TEXT).unlink()
    with (
        join(folder / CREW, {"data.captions": 1}),
        pytest.raises(InputError, match=r"data.cache .*: process \d+ on .* is at work in it. Wait for it or stop it"),
    ):
        repair(config)
    assert not (folder / "quarantine.jsonl").exists()
    with join(folder / CREW, {"work": "repair"}):
        for work in (lambda: repair(config), lambda: preprocess(config, QUIET)):
            with pytest.raises(InputError, match=r"is at work in it. Wait for it or stop it"):
                work()
    repair(config)
    assert verify(folder).problems == []


def test_nobody_writes_shards_while_a_repair_looks_for_bad_ones(config):
    """What a job finishes then would be taken for bad, and moved aside."""
    folder = config.data.cache
    before = stored(folder)

    def check():
        with pytest.raises(
            InputError, match=r"data.cache .*: process \d+ on .* is at work in it. Wait for it or stop it"
        ):
            preprocess(config, QUIET)
        return verify(folder)

    repair_cache(config, check, QUIET)
    assert stored(folder) == before


def test_a_folder_without_a_cache_is_left_as_it_is(demo_config, tmp_path):
    with pytest.raises(InputError, match="no cache is there"):
        repair(demo_config(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_kill_9_of_a_repair_at_any_moment_loses_nothing(config, cache):
    folder = config.data.cache
    whole = stored(folder)
    bad = [str(cache.table.path[row]) for row in (0, 2)]
    fork = multiprocessing.get_context("fork")

    def begin() -> tuple[list[bytes], multiprocessing.Process]:
        damaged = []
        for path in bad:
            flip(folder / path, row=0)
            damaged.append((folder / path).read_bytes())
        index_path(folder / str(cache.table.path[1])).unlink()
        process = fork.Process(target=repair, args=(config,))
        process.start()
        return damaged, process

    start = time.monotonic()
    _, process = begin()
    process.join(60)
    seconds = time.monotonic() - start  # on this machine, as it is just now
    assert stored(folder) == whole
    shutil.rmtree(folder / "quarantine")
    num_killed = 0
    for part in (0.2, 0.5, 0.8):
        damaged, process = begin()
        time.sleep(delay := part * seconds)
        process.kill()
        process.join(60)
        num_killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), delay
        # Killed at the very end, it has all but left the crew; the next one clears that up.
        finished = {path: data for path, data in stored(folder).items() if not path.startswith("crew/")} == whole
        assert (verify(folder).problems == []) == finished, f"killed after {delay:.3f} s"
        repair(config)
        assert stored(folder) == whole, f"killed after {delay:.3f} s"
        assert set(damaged) <= set(quarantined(folder).values()), f"killed after {delay:.3f} s"
        shutil.rmtree(folder / "quarantine")
    assert num_killed > 0
