import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.errors import InputError
from data.cache.manifest import read_manifest, read_shard_table, write_manifest
from data.cache.shard_index import read_index
from data.cache_layout import EMPTY_TEXT, MANIFEST, SHARD_TABLE
from data.verify.cache import verify_cache
from tests.data.made_caches import index_of
from tests.data.verify.verified import BAD, MIDDLE, SHARDS, found, verify


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- a whole cache ----------------------------------------------------------------------------------------------------


def test_a_whole_cache_has_no_problems_and_every_byte_is_counted(folder):
    lock, counted, total = threading.Lock(), [], []

    def advance(count: int) -> None:
        with lock:
            counted.append(count)

    checked = verify_cache(folder, threads=3, start=total.append, advance=advance)
    tars = sum(path.stat().st_size for path in folder.rglob("*.tar"))
    assert checked.problems == checked.rebuildable == checked.bad == []
    assert total == [tars] and sum(counted) == tars


def test_a_whole_cache_of_int8_texts_has_no_problems(make_cache):
    folder = make_cache(SHARDS, text_dtype="int8").folder
    assert verify(folder).problems == []
    manifest, table = read_manifest(folder), read_shard_table(folder)
    write_manifest(folder, replace(manifest, text_dtype="bf16"), table)
    assert all("holds {'t5_scale': ('F32', [8])" in what for _, _, what in found(folder))


def test_verify_changes_nothing(folder):
    before = tree(folder)
    assert verify(folder).problems == []
    assert tree(folder) == before
    (folder / BAD).write_bytes(b"")
    index_of(folder / "shards/removal/48x64-000003.tar").unlink()
    before = tree(folder)
    assert len(verify(folder).problems) > 1
    assert tree(folder) == before


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no cache is there. Give the folder that `fluxfill preprocess CONFIG` wrote"):
        verify(tmp_path)


# --- the manifest, and what lies beside the shards --------------------------------------------------------------------


def test_a_flipped_bit_in_a_constant_is_noticed(folder):
    path = folder / EMPTY_TEXT
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    checked = verify(folder)
    assert found(folder) == [(EMPTY_TEXT, "", "differs from what was written")]
    assert checked.bad == [EMPTY_TEXT] and checked.rebuildable == []
    path.unlink()
    assert found(folder) == [(EMPTY_TEXT, "", "missing or unreadable")]


def test_a_damaged_table_is_named_and_the_shards_are_judged_by_their_indexes(folder):
    (folder / SHARD_TABLE).write_bytes((folder / SHARD_TABLE).read_bytes()[:-40])
    damage(folder / BAD)
    problems = found(folder)
    assert [problem[:2] for problem in problems] == [(SHARD_TABLE, ""), (BAD, f"{MIDDLE}.safetensors")]
    assert problems[0][2].startswith("damaged (")


def damage(tar: Path) -> None:
    """Flip a bit in the middle sample's latents."""
    data = bytearray(tar.read_bytes())
    data[int(read_index(index_of(tar)).latents[2, 0]) + 300] ^= 1
    tar.write_bytes(data)


def test_a_table_of_another_writing_is_noticed(folder):
    """Restored from a copy, say: whole in itself, but not this manifest's."""
    with np.load(folder / SHARD_TABLE) as columns:
        kept = {name: columns[name][:-1] for name in columns.files}
    np.savez_compressed(folder / SHARD_TABLE, **kept)
    problems = found(folder)
    assert (SHARD_TABLE, "", "differs from what was written") in problems
    assert ("shards/removal/48x64-000003.tar", "", f"not listed in {SHARD_TABLE}") in problems
    assert any(what.startswith("lists samples {'photos'") for _, _, what in problems)


def test_a_table_that_names_files_elsewhere_is_not_followed(folder):
    with np.load(folder / SHARD_TABLE) as columns:
        kept = {name: columns[name] for name in columns.files}
    kept["path"][0] = "shards/../../etc/x.tar"
    np.savez_compressed(folder / SHARD_TABLE, **kept)
    assert (SHARD_TABLE, "", "damaged (names a file outside of the cache: shards/../../etc/x.tar)") in found(folder)


@pytest.mark.parametrize("content", ["", "{}", "<!DOCTYPE html>"])
def test_a_damaged_manifest_is_named(folder, content):
    (folder / MANIFEST).write_text(content)
    damage(folder / BAD)
    problems = found(folder)
    assert [problem[:2] for problem in problems] == [(MANIFEST, ""), (BAD, f"{MIDDLE}.safetensors")]
    assert problems[0][2].startswith("damaged (")


@pytest.mark.parametrize("counts", ["samples", "hole_fractions"])
def test_a_manifest_that_counts_otherwise_than_its_shards_is_noticed(folder, counts):
    manifest, table = read_manifest(folder), read_shard_table(folder)
    other = {"samples": {"photos": {"train": 9, "holdout": 4}}, "hole_fractions": {"photos": [1] * 10}}[counts]
    write_manifest(folder, replace(manifest, **{counts: other}), table)
    assert {path for path, _, _ in found(folder)} == {SHARD_TABLE if counts == "samples" else MANIFEST}


def test_tensors_of_another_size_than_the_manifest_says_are_named(folder):
    manifest, table = read_manifest(folder), read_shard_table(folder)
    write_manifest(folder, replace(manifest, text_length=9), table)
    problems = found(folder)
    assert {member.partition(".")[2] for _, member, _ in problems} == {"text.safetensors"}
    assert "holds {" in problems[0][2] and "the manifest says {'t5': ('BF16', [9, 6])" in problems[0][2]
    assert verify(folder).bad == sorted(table.path.tolist()) and verify(folder).rebuildable == []


def test_files_that_belong_to_nothing_are_named(folder):
    (folder / "shards" / "photos" / "48x64-000009.tar").write_bytes(b"")
    (folder / "shards" / "photos" / "48x64-000008.tar.part").write_bytes(b"")
    (folder / "index" / "photos" / "48x64-000009.index").write_bytes(b"")
    strays = [
        "index/photos/48x64-000009.index",
        "shards/photos/48x64-000008.tar.part",
        "shards/photos/48x64-000009.tar",
    ]
    assert found(folder) == [(path, "", f"not listed in {SHARD_TABLE}") for path in strays]


def test_an_interrupted_cache_is_unfinished_and_its_shards_are_judged_by_their_indexes(folder):
    """As a killed preprocess leaves it: no manifest, a tar without index, and a .part."""
    (folder / MANIFEST).unlink()
    index_of(folder / "shards/removal/48x64-000003.tar").unlink()
    (folder / "shards/photos/48x64-000008.tar.part").write_bytes(b"half")
    damage(folder / BAD)
    problems = found(folder)
    assert [problem[:2] for problem in problems] == [
        ("index/removal/48x64-000003.index", ""),
        (MANIFEST, ""),
        (BAD, f"{MIDDLE}.safetensors"),
        ("shards/removal/48x64-000003.tar", ""),
    ]
    assert problems[1][2].startswith("missing: preprocessing was interrupted, or is still at work; run it again")
