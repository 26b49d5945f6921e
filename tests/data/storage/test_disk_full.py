"""Disks that fill up while something is written to them. `small_disk` is one."""

import errno
import os
import re

import numpy as np
import pytest

from configs.errors import InputError
from data.cache import dropout_tensors
from data.cache.manifest import write_manifest
from data.cache.shard_index import read_index, write_index
from data.cache.shard_writer import ShardWriter
from data.cache.validation_items import ValidationItem, write_validation_items
from data.preprocessing import share_plan
from data.preprocessing.worker_group import WorkerGroup
from data.samples.geometry import Bucket, Pixels
from data.sources.download_cache import open_new_file
from data.sources.scan_cache import ScanCache
from data.storage.atomic_write import write_atomically, write_text_atomically
from data.storage.disk_full import FINISHED_IS_KEPT, DiskFull, raise_disk_full
from tests.data.made_caches import index_of

SQUARE = Bucket(64, 64)


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_index_of_a_shard(disk, cache, make_sample, make_text):
    write_index(disk / "a.index", read_index(index_of(cache.folder / str(cache.table.path[0]))))


def write_plan(disk, *_):
    group = WorkerGroup(disk.parent / "crew", {})
    share_plan._make_and_share(group, list)


def write_pack(disk, *_):
    with open_new_file(disk / "a.pictures") as pack:
        pack.write(b"\1" * 10_000)


def write_pictures(disk, *_):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    item = ValidationItem("a", "train", "cats", "a.tar", 0, "a cat")
    write_validation_items(disk, [(item, Pixels(noise, noise, noise[:, :, 0] > 9))] * 4, lambda: None)


def write_shard(disk, cache, make_sample, make_text):
    with ShardWriter(disk / "shards" / "a.tar") as writer:
        writer.add_text("text-1", **make_text("text-1"))
        for number in range(8):
            writer.add_sample(make_sample(f"picture-{number}", SQUARE, text="text-1"))
        writer.finish(plan="0" * 32)


WRITERS = {
    "text": lambda disk, *_: write_text_atomically(disk / "a.json", "{}" * 8000),
    "library": lambda disk, *_: write_atomically(
        disk / "a.npz", lambda path: np.savez(path.open("wb"), a=np.zeros(9999))
    ),
    "index": write_index_of_a_shard,
    "dropout tensors": lambda disk, _, make_sample, make_text: dropout_tensors._write(
        disk / "a.safetensors", make_text("a"), {}
    ),
    "scan result": lambda disk, *_: ScanCache(disk, "cats").write("a", [["a" * 8000]]),
    "pack of remote pictures": write_pack,
    "validation pictures": write_pictures,
    "manifest": lambda disk, cache, *_: write_manifest(disk, cache.manifest, cache.table),
    "shard": write_shard,
}


@pytest.mark.fault(9, "a real small disk, filled under every kind of file of a cache")
@pytest.mark.parametrize("what", WRITERS)
def test_what_does_not_fit_is_named_and_leaves_nothing(small_disk, make_cache, make_sample, make_text, what):
    cache = make_cache([("cats", "64x64", 3)])
    (small_disk.folder / "there before").write_text("kept")
    with small_disk.with_room_for(0):
        with pytest.raises(DiskFull) as caught:
            WRITERS[what](small_disk.folder, cache, make_sample, make_text)
        assert files_below(small_disk.folder) == {"there before": b"kept"}
    message = str(caught.value)
    assert message.startswith(str(small_disk.folder))
    assert re.search(r"cannot be written \((No space left on device|File too large)\)\. .* free there", message)
    assert message.endswith("Make room and run the same command again.")  # what is kept, the program knows
    words = r"same command again: what is finished is kept\.$"
    with pytest.raises(DiskFull, match=words), raise_disk_full(small_disk.folder, kept=FINISHED_IS_KEPT):
        raise caught.value
    WRITERS[what](small_disk.folder, cache, make_sample, make_text)
    assert len(files_below(small_disk.folder)) > 1


def test_a_shard_whose_index_does_not_fit_is_not_there(small_disk, make_cache, make_sample, make_text):
    if not small_disk.is_real:
        pytest.skip("no disk can be mounted here, and an index is smaller than its tar")
    write_shard(small_disk.folder, None, make_sample, make_text)
    size = (small_disk.folder / "shards" / "a.tar").stat().st_size
    for file in (small_disk.folder / "shards").iterdir():
        file.unlink()
    with small_disk.with_room_for(-(-size // 4096) * 4096):
        with pytest.raises(DiskFull, match=r"shards/a\.index: cannot be written"):
            write_shard(small_disk.folder, None, make_sample, make_text)
        assert files_below(small_disk.folder) == {}


def test_what_was_there_before_stays(small_disk):
    file = small_disk.folder / "a.json"
    write_text_atomically(file, "old")
    with small_disk.with_room_for(4096), pytest.raises(DiskFull, match=r"about 97\.7 KiB are needed"):
        write_text_atomically(file, "new " * 25_000)
    assert files_below(small_disk.folder) == {"a.json": b"old"}


def test_it_is_an_error_of_the_user_and_of_the_system(tmp_path):
    """A trainer that goes on without a save that failed asks for the second."""
    with pytest.raises(InputError) as caught, raise_disk_full(tmp_path / "a"):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert isinstance(caught.value, OSError) and caught.value.errno == errno.EDQUOT
    assert f"{tmp_path}/a: cannot be written (Disk quota exceeded)" in str(caught.value)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), raise_disk_full(tmp_path):
        raise PermissionError(errno.EACCES, "no")
