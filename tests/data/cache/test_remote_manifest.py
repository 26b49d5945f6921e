import multiprocessing
import time
from collections import Counter
from dataclasses import replace

import pytest

import data.cache.remote_manifest
from configs.errors import InputError
from data.cache.manifest import hash_files, read_manifest, read_shard_table, write_manifest
from data.cache.remote_manifest import fetch_manifest
from data.cache_layout import MANIFEST, SHARD_TABLE
from tests.patience import PATIENCE


def test_the_head_is_fetched_whole_and_once(remote, tmp_path):
    url, server, cache = remote
    (cache.folder / "validation").mkdir()
    (cache.folder / "validation" / "items.json").write_text("[]")
    write_manifest(cache.folder, cache.manifest, cache.table)
    folder = fetch_manifest(url, tmp_path / "node")
    assert read_manifest(folder).files == read_manifest(cache.folder).files
    assert len(read_shard_table(folder)) == 4
    assert (folder / "validation" / "items.json").read_text() == "[]"
    before = Counter(server.requests)
    assert fetch_manifest(url, tmp_path / "node") == folder
    assert server.requests - before == {MANIFEST: 1}, "whether it is still the same"


def test_a_cache_that_has_changed_has_another_head(remote, tmp_path):
    url, _, cache = remote
    before = fetch_manifest(url, tmp_path / "node")
    write_manifest(cache.folder, replace(cache.manifest, vae_scale=0.5), cache.table)
    after = fetch_manifest(url, tmp_path / "node")
    assert (read_manifest(before).vae_scale, read_manifest(after).vae_scale) == (cache.manifest.vae_scale, 0.5)


@pytest.mark.parametrize("fault", [503, "cut", "page"])
def test_a_head_that_does_not_come_is_tried_again_and_named(remote, tmp_path, no_waits, fault):
    url, server, _ = remote
    server.faults[SHARD_TABLE] = [fault] * 3
    fetch_manifest(url, tmp_path / "node")
    server.faults[SHARD_TABLE] = [fault] * 99
    with pytest.raises(InputError, match=rf"{url}/{SHARD_TABLE}: failed 8 time\(s\), at last with"):
        fetch_manifest(url, tmp_path / "another-node")


def test_a_page_in_the_place_of_the_manifest_is_named(remote, tmp_path):
    url, server, _ = remote
    server.faults[MANIFEST] = ["page"]
    with pytest.raises(InputError, match=rf"{url}/{MANIFEST}: damaged"):
        fetch_manifest(url, tmp_path / "node")


def test_a_manifest_that_names_files_elsewhere_writes_none(remote, tmp_path, monkeypatch):
    url, _, cache = remote
    (cache.folder.parent / "outside.txt").write_text("a stranger's")
    with monkeypatch.context() as patched:
        patched.setattr("data.cache.manifest.hash_files", lambda *_: hash_files(cache.folder, ["../outside.txt"]))
        write_manifest(cache.folder, cache.manifest, cache.table)
    with pytest.raises(
        InputError, match=rf"{url}/{MANIFEST}: damaged \(names a file outside of the cache: \.\./outside"
    ):
        fetch_manifest(url, tmp_path / "node")
    assert not (tmp_path / "node").exists()


@pytest.mark.parametrize("place", ["node", "/proc/node"], ids=["below a file", "where no folder can be made"])
def test_a_local_cache_that_cannot_be_written_to_is_named(remote, tmp_path, place):
    url, _, _ = remote
    (tmp_path / "node").write_text("a file, which stands for what its user may not write to")
    with pytest.raises(
        InputError, match=r"data.local_cache .*node: cannot be written to \(.*\)\. Point data.local_cache"
    ):
        fetch_manifest(url, tmp_path / place)


def heads(node):
    """The copies of manifests on a node."""
    return sorted((node / "heads").iterdir())


def change_manifest(cache, vae_scale):
    write_manifest(cache.folder, replace(cache.manifest, vae_scale=vae_scale), cache.table)


def test_a_head_goes_when_a_later_one_is_there_and_its_last_reader_has_ended(remote, tmp_path, monkeypatch):
    url, _, cache = remote
    node = tmp_path / "node"
    readers = {}
    monkeypatch.setattr(data.cache.remote_manifest, "_in_use", readers)  # their handles, which end with a process
    first = fetch_manifest(url, node)
    (node / "heads" / "another-url").mkdir()
    change_manifest(cache, 0.5)
    second = fetch_manifest(url, node)
    assert read_manifest(first).vae_scale == cache.manifest.vae_scale, "it is still read"
    del readers[first]
    change_manifest(cache, 0.25)
    third = fetch_manifest(url, node)
    assert heads(node) == sorted([second, third, node / "heads" / "another-url"])
    assert len(read_shard_table(second)) == 4


def test_the_head_that_another_process_reads_goes_with_the_process(remote, tmp_path, monkeypatch):
    url, _, cache = remote
    node = tmp_path / "node"
    monkeypatch.setattr(data.cache.remote_manifest, "_in_use", {})
    context = multiprocessing.get_context("fork")  # https alone is read in a new one
    reads = context.Event()

    def read_on():
        fetch_manifest(url, node)
        reads.set()
        time.sleep(PATIENCE)  # it is killed before

    reader = context.Process(target=read_on, daemon=True)
    reader.start()
    assert reads.wait(PATIENCE)
    (read,) = heads(node)
    change_manifest(cache, 0.5)
    fetch_manifest(url, node)
    assert read in heads(node)
    reader.kill()
    reader.join()
    change_manifest(cache, 0.25)
    fetch_manifest(url, node)
    assert read not in heads(node)


def test_what_a_killed_process_left_of_a_head_goes_too(remote, tmp_path, monkeypatch):
    url, _, _ = remote
    monkeypatch.setattr(data.cache.remote_manifest, "_in_use", {})
    first = fetch_manifest(url, tmp_path / "node")
    data.cache.remote_manifest._in_use.clear()
    first.rename(first.with_name(f"{first.name}.01234567.part"))
    second = fetch_manifest(url, tmp_path / "node")
    assert second == first and heads(tmp_path / "node") == [second]


def test_whoever_waited_for_a_head_that_was_deleted_makes_another(remote, tmp_path, monkeypatch):
    url, _, _ = remote
    lock, deleted = data.cache.remote_manifest.lock, []

    def lock_late(handle):
        if not deleted:
            deleted.append(tmp_path / "gone")
            (head,) = heads(tmp_path / "node")
            head.rename(deleted[0])
        lock(handle)

    monkeypatch.setattr(data.cache.remote_manifest, "lock", lock_late)
    folder = fetch_manifest(url, tmp_path / "node")
    assert len(read_shard_table(folder)) == 4
    assert [path.name for path in deleted[0].iterdir()] == ["fetch.lock"]
