import json
import multiprocessing
import os
import shutil
import signal
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from configs.errors import InputError
from data.cache.shard_index import read_index
from data.cache_layout import CREW, EMPTY_TEXT, MANIFEST, SHARD_TABLE
from data.preprocessing.run import preprocess
from data.preprocessing.worker_group import join
from data.verify.cache import CheckedCache, verify_cache
from data.verify.repair import refuse_other_config, repair_cache
from tests.data.made_caches import index_of
from tests.patience import PATIENCE
from tests.workers import start_worker

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


def repair_as_worker(config, _) -> None:
    repair(config)


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
    data[int(read_index(index_of(tar)).latents[row, 0]) + 300] ^= 1
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
    indexes = {index_of(folder / path).relative_to(folder).as_posix() for path in (bad, cut)}
    assert aside.keys() == {bad, cut, *indexes}
    said = {(record["shard"], record["member"]): record for record in records(folder)}
    key = read_index(index_of(folder / bad)).keys[1]
    record = said[bad, f"{key}.safetensors"]
    assert record["why"] == "does not match its checksum"
    assert (folder / record["moved_to"]).read_bytes() == damaged[bad]
    assert record["when"].endswith("+00:00")


def test_a_lost_index_is_rebuilt_without_sources_or_model(config, cache, monkeypatch):
    folder = config.data.cache
    whole = stored(folder)
    lost, broken = (index_of(folder / str(path)) for path in cache.table.path[:2])
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
    index_of(half).unlink()
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


@pytest.mark.parametrize("fault", ["gone", "black mask"])
def test_what_cannot_be_made_again_stays_where_it_is(config, cache, demo_config, tmp_path, fault):
    """Most samples of a bad shard are good: training reads them, and replaces the others."""
    folder = config.data.cache
    flip(folder / str(cache.table.path[0]), row=0)
    index_of(folder / str(cache.table.path[1])).unlink()
    before = {path: data for path, data in stored(folder).items() if not path.startswith("scan/")}
    place = Path(config.data.datasets[0].target if fault == "gone" else config.data.datasets[0].mask)
    wrong = tmp_path / "wrong"
    if fault == "black mask":
        shutil.copytree(place, wrong)
        file = next(path for path in sorted(wrong.iterdir()) if path.suffix == ".png")
        with Image.open(file) as mask:
            Image.new("L", mask.size).save(file)
    key = "target" if fault == "gone" else "mask"
    console = Console(file=StringIO(), record=True, width=1000)
    other = demo_config(folder, f"data.datasets.0.{key}={wrong}")
    with pytest.raises(InputError, match="wrong does not exist" if fault == "gone" else "the mask is all black"):
        repair_cache(other, partial(verify, folder), console)
    assert "No shard was moved" in console.export_text()
    assert quarantined(folder) == {}
    after = {path: data for path, data in stored(folder).items() if not path.startswith("scan/")}
    rebuilt = index_of(folder / str(cache.table.path[1])).relative_to(folder).as_posix()
    assert after.keys() - before.keys() == {rebuilt}, "what needs no pictures is mended"
    assert {path: after[path] for path in before} == before
    repair(config)
    assert verify(folder).problems == []


def test_a_repair_that_fails_once_shards_are_moved_says_where_they_are(config, cache, monkeypatch):
    folder = config.data.cache
    bad = str(cache.table.path[0])
    flip(folder / bad, row=0)

    def fail(*_):
        raise InputError("no device is free. Wait for one.")

    console = Console(file=StringIO(), record=True, width=1000)
    with monkeypatch.context() as patched:
        patched.setattr("data.verify.repair.preprocess", fail)
        with pytest.raises(InputError, match="no device is free"):
            repair_cache(config, partial(verify, folder), console)
    said = console.export_text()
    (place,) = (folder / "quarantine").iterdir()
    assert f"What was bad lies in {place} now" in said and (place / bad).exists()
    assert "Not all that was bad is made again: see below. The same command makes what is missing." in said
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


@pytest.mark.parametrize("step", range(1, 9))
def test_a_repair_killed_at_any_step_is_judged_rightly_and_completed(config, cache, step):
    folder = config.data.cache
    whole = stored(folder)
    bad, rebuilt = str(cache.table.path[0]), str(cache.table.path[1])
    flip(folder / bad, row=0)
    index_of(folder / rebuilt).write_bytes(b"<html>")
    damaged = (folder / bad).read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_die_at, args=(step, config))
    process.start()
    process.join(PATIENCE)
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
    """Before a change of the cache, in each part of those that it makes."""
    folder = config.data.cache
    whole = stored(folder)
    bad = [str(cache.table.path[row]) for row in (0, 2)]

    def run(kill_at: int | None = None) -> tuple[list[bytes], int | None, int]:
        damaged = []
        for path in bad:
            flip(folder / path, row=0)
            damaged.append((folder / path).read_bytes())
        index_of(folder / str(cache.table.path[1])).unlink()
        code, message, changes = start_worker(config, run=repair_as_worker, kill_at=kill_at).join()
        assert message == ""
        return damaged, code, changes

    _, code, changes = run()
    assert code == 0 and stored(folder) == whole
    shutil.rmtree(folder / "quarantine")
    for at in (int(part * changes) for part in (0.1, 0.3, 0.5, 0.7, 0.9)):
        damaged, code, _ = run(at)
        assert code == -signal.SIGKILL, at
        # Killed at the very end, it has all but left the crew; the next one clears that up.
        finished = {path: data for path, data in stored(folder).items() if not path.startswith("crew/")} == whole
        assert (verify(folder).problems == []) == finished, f"killed before change {at} of {changes}"
        repair(config)
        assert stored(folder) == whole, f"killed before change {at} of {changes}"
        assert set(damaged) <= set(quarantined(folder).values()), f"killed before change {at} of {changes}"
        shutil.rmtree(folder / "quarantine")
