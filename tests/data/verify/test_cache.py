import io
import random
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.errors import InputError
from data.cache.manifest import read_manifest, read_shard_table, write_manifest
from data.cache.shard_index import ShardIndex, read_index, write_index
from data.cache_layout import EMPTY_TEXT, MANIFEST, SHARD_TABLE, index_path
from data.verify.cache import CheckedCache, verify_cache

SHARDS = [("photos", "48x64", 5), ("photos", "48x64", 5), ("photos", "32x32", 4, "holdout"), ("removal", "48x64", 1)]
BAD = "shards/photos/48x64-000001.tar"  # the one that is damaged; its samples are photos-1-0 to photos-1-4
MIDDLE = "photos-1-2"


@pytest.fixture
def folder(make_cache) -> Path:
    return make_cache(SHARDS, num_variants=2).folder


def verify(folder: Path, threads: int = 2) -> CheckedCache:
    return verify_cache(folder, threads=threads, start=lambda _: None, advance=lambda _: None)


def found(folder: Path) -> list[tuple[str, str, str]]:
    return [(problem.path, problem.member, problem.what) for problem in verify(folder).problems]


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
    index_path(folder / "shards/removal/48x64-000003.tar").unlink()
    before = tree(folder)
    assert len(verify(folder).problems) > 1
    assert tree(folder) == before


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no cache is there. Give the folder that `fluxfill preprocess CONFIG` wrote"):
        verify(tmp_path)


# --- damaged shards: in most of these cases webdataset ends early without a word --------------------------------------


def _cut(at: Callable[[ShardIndex], int]):
    return lambda data, index: data[: at(index)]


def _flip(at: Callable[[ShardIndex], int]):
    def damage(data: bytearray, index: ShardIndex) -> bytearray:
        data[at(index)] ^= 4
        return data

    return damage


def _zero(at: Callable[[ShardIndex], int]):
    def damage(data: bytearray, index: ShardIndex) -> bytearray:
        data[at(index) : at(index) + 512] = bytes(512)
        return data

    return damage


def _latents(index: ShardIndex) -> int:
    return int(index.latents[2, 0])


def _meta_header(index: ShardIndex) -> int:
    return int(index.metas[2, 0]) - 512


DAMAGES = {
    "cut in data": (_cut(lambda i: _latents(i) + 700), f"{MIDDLE}.safetensors", "the file ends inside it, at byte"),
    "cut in header": (_cut(lambda i: _latents(i) - 300), f"{MIDDLE}.safetensors", "the file ends inside its header"),
    "cut at member boundary": (
        _cut(lambda i: int(i.masked[2, 0, 0]) - 512),
        f"{MIDDLE}.m0.safetensors",
        r"the file ends before its header, at byte \d+; 10 more members are lost with it",
    ),
    "cut at sample boundary": (
        _cut(lambda i: _latents(i) - 512),
        f"{MIDDLE}.safetensors",
        r"the file ends before its header, at byte \d+; 11 more members are lost with it",
    ),
    "cut in the end blocks": (
        _cut(lambda i: int(i.metas[4].sum() + 511) // 512 * 512 + 512),
        "",
        "without the two blocks that end a tar",
    ),
    "bit flip in header name": (_flip(lambda i: _latents(i) - 510), f"{MIDDLE}.safetensors", "tar header is damaged"),
    "bit flip in header size": (_flip(lambda i: _latents(i) - 380), f"{MIDDLE}.safetensors", "tar header is damaged"),
    "bit flip in data": (
        _flip(lambda i: _latents(i) + 500),
        f"{MIDDLE}.safetensors",
        "does not match its checksum",
    ),
    "bit flip in the tensors' header": (
        _flip(lambda i: int(i.masked[2, 1, 0]) + 20),
        f"{MIDDLE}.m1.safetensors",
        "does not match its checksum",
    ),
    "bit flip in the json": (_flip(lambda i: int(i.metas[2, 0]) + 9), f"{MIDDLE}.json", "does not match its checksum"),
    "bit flip in a text": (
        _flip(lambda i: int(i.texts[1].sum()) - 3),
        "text-0000000000000001.safetensors",
        r"does not match its checksum \(the text of 2 samples, photos-1-1, photos-1-3\)",
    ),
    "bit flip in padding": (
        _flip(lambda i: int(i.latents[2].sum()) + 1),
        f"{MIDDLE}.safetensors",
        "padding after it is not zero",
    ),
    "512 zero bytes over a header": (_zero(_meta_header), f"{MIDDLE}.json", "tar header is all zeros"),
    "zeros over the first header": (_zero(lambda i: 0), "text 0", "tar header is all zeros"),
    "empty file": (
        lambda data, index: b"",
        "text 0",
        r"at byte 0 \(the text of 3 samples, photos-1-0",
    ),
    "html page": (
        lambda data, index: b"<!DOCTYPE html><title>503</title>",
        "text 0",
        "the file ends inside its header",
    ),
    "bytes after its end": (lambda data, index: data + b"GIF89a", "", "something stands after its end"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(folder, damage):
    change, member, what = DAMAGES[damage]
    path = folder / BAD
    whole = path.read_bytes()
    path.write_bytes(bytes(change(bytearray(whole), read_index(index_path(path)))))
    assert path.read_bytes() != whole
    checked = verify(folder)
    assert {problem.path for problem in checked.problems} == {BAD}
    assert checked.bad == [BAD] and checked.rebuildable == []
    if path.stat().st_size != len(whole):
        assert checked.problems[0].what == f"{path.stat().st_size} bytes, {len(whole)} were written"
    named = [problem for problem in checked.problems if problem.member == member]
    assert any(re.search(what, problem.what) for problem in named), checked.problems
    assert len(checked.problems) <= 2, "one damage is one problem, and perhaps the file's size"


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_noticed_without_the_index_too(folder, damage):
    change, _, _ = DAMAGES[damage]
    path = folder / BAD
    path.write_bytes(bytes(change(bytearray(path.read_bytes()), read_index(index_path(path)))))
    index_path(path).unlink()
    checked = verify(folder)
    assert {problem.path for problem in checked.problems} == {BAD, BAD.replace(".tar", ".index")}
    assert checked.bad == [BAD] and checked.rebuildable == []


def test_a_flipped_bit_anywhere_in_a_shard_is_noticed(folder):
    path = folder / BAD
    whole, rng = path.read_bytes(), random.Random(5)
    for place in rng.sample(range(len(whole)), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert verify(folder).bad == [BAD], place


def test_every_bad_member_of_a_shard_is_named(folder):
    """What stands after a damaged header is read all the same: the index says where it is."""
    path = folder / BAD
    index, data = read_index(index_path(path)), bytearray(path.read_bytes())
    data[int(index.latents[0, 0]) - 512 : int(index.latents[0, 0])] = bytes(512)
    for row in (2, 4):
        data[int(index.latents[row, 0]) + 300] ^= 1
    path.write_bytes(data)
    assert found(folder) == [
        (BAD, "photos-1-0.safetensors", "its tar header is all zeros: other readers take it for the end of the tar"),
        (BAD, "photos-1-2.safetensors", "does not match its checksum"),
        (BAD, "photos-1-4.safetensors", "does not match its checksum"),
    ]


def test_a_missing_shard_is_named(folder):
    (folder / BAD).unlink()
    assert found(folder) == [(BAD, "", "missing")]
    index_path(folder / BAD).unlink()
    assert found(folder) == [(BAD.replace(".tar", ".index"), "", "missing"), (BAD, "", "missing")]


def test_a_shard_in_the_place_of_another_is_noticed(folder):
    other = folder / "shards/photos/48x64-000000.tar"
    for path in (folder / BAD, index_path(folder / BAD)):
        shutil.copy(other.with_suffix(path.suffix), path)
    names = {path: what for path, _, what in found(folder)}
    assert names[BAD.replace(".tar", ".index")] == "belongs to another shard"
    assert "its sha256 differs" in names[BAD]


def test_a_shard_that_cannot_be_read_is_named(folder, monkeypatch):
    class Failing(io.FileIO):
        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("data.verify.shard.io.FileIO", Failing)
    assert (BAD, "", "cannot be read (Input/output error)") in found(folder)


# --- indexes ----------------------------------------------------------------------------------------------------------

INDEX = BAD.replace(".tar", ".index")


@pytest.mark.parametrize(
    "content, what",
    [(None, "missing"), (b"", "damaged index"), (b"<html>", "damaged index"), (0.5, "damaged index")],
)
def test_a_lost_index_is_named_and_its_shard_is_not(folder, content, what):
    path = folder / INDEX
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:500] if content == 0.5 else content)
    checked = verify(folder)
    assert [(problem.path, problem.member) for problem in checked.problems] == [(INDEX, "")]
    assert checked.problems[0].what.startswith(what)
    assert [whole.path for whole in checked.rebuildable] == [BAD] and checked.bad == []


@pytest.mark.parametrize(
    "column, what",
    [
        ("latents", "photos-1-1.safetensors: does not fit its shard: the index places 1616 bytes at"),
        ("latents_xxh3", "photos-1-1.safetensors: does not fit its shard: does not match its checksum"),
        ("masked_xxh3", "photos-1-1.m0.safetensors: does not fit its shard: does not match its checksum"),
        ("tokens", "photos-1-1.json: does not fit its shard: says text, tokens and hole fractions are"),
        ("text_row", "photos-1-1.json: does not fit its shard: says text, tokens and hole fractions are"),
        ("hole_fraction", "photos-1-1.json: does not fit its shard: says text, tokens and hole fractions are"),
        ("keys", "photos-1-x.safetensors: does not fit its shard: its tar header says photos-1-1.safetensors"),
        ("plan", ": plan 0123456789abcdef0123456789abcdef, the head says"),
    ],
)
def test_an_index_that_says_otherwise_than_its_shard_is_noticed(folder, column, what):
    """Its own checksum is right: a program wrote it so."""
    index = read_index(folder / INDEX)
    columns = {name: np.array(value) for name, value in vars(index).items() if isinstance(value, np.ndarray)}
    if column == "keys":
        changed = replace(index, keys=tuple("photos-1-x" if key == "photos-1-1" else key for key in index.keys))
    elif column == "plan":
        changed = replace(index, plan="0123456789abcdef0123456789abcdef")
    else:
        value = columns[column]
        if column == "latents":
            value[1, 0] += 512
        elif column == "text_row":
            value[1] = 0
        else:
            value[1] += value.dtype.type(1) if column != "hole_fraction" else np.float32(0.01)
        changed = replace(index, **{column: value})
    write_index(folder / INDEX, changed)
    checked = verify(folder)
    said = [f"{problem.member}: {problem.what}" for problem in checked.problems if problem.path == INDEX]
    assert any(what in line for line in said), said
    assert [whole.path for whole in checked.rebuildable] == [BAD] and BAD not in checked.bad


# --- the head, and what lies beside the shards ------------------------------------------------------------------------


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
    data[int(read_index(index_path(tar)).latents[2, 0]) + 300] ^= 1
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
    assert {member.partition("-")[0] for _, member, _ in problems} == {"text"}
    assert "holds {" in problems[0][2] and "the manifest says {'t5': ('BF16', [9, 6])" in problems[0][2]
    assert verify(folder).bad == sorted(table.path.tolist()) and verify(folder).rebuildable == []


def test_files_that_belong_to_nothing_are_named(folder):
    (folder / "shards" / "photos" / "48x64-000009.tar").write_bytes(b"")
    (folder / "shards" / "photos" / "48x64-000008.tar.part").write_bytes(b"")
    strays = ["shards/photos/48x64-000008.tar.part", "shards/photos/48x64-000009.tar"]
    assert found(folder) == [(path, "", f"not listed in {SHARD_TABLE}") for path in strays]


def test_an_interrupted_cache_is_unfinished_and_its_shards_are_judged_by_their_indexes(folder):
    """As a killed preprocess leaves it: no manifest, a tar without index, and a .part."""
    (folder / MANIFEST).unlink()
    index_path(folder / "shards/removal/48x64-000003.tar").unlink()
    (folder / "shards/photos/48x64-000008.tar.part").write_bytes(b"half")
    damage(folder / BAD)
    problems = found(folder)
    assert [problem[:2] for problem in problems] == [
        (MANIFEST, ""),
        (BAD, f"{MIDDLE}.safetensors"),
        ("shards/removal/48x64-000003.index", ""),
        ("shards/removal/48x64-000003.tar", ""),
    ]
    assert problems[0][2].startswith("missing: preprocessing was interrupted, or is still at work; run it again")
