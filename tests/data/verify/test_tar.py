"""Damaged shards: in most of these cases webdataset ends early without a word."""

import random
import re
from collections.abc import Callable

import pytest

from data.cache.shard_index import ShardIndex, read_index
from tests.data.made_caches import index_of
from tests.data.verify.verified import BAD, INDEX, MIDDLE, found, verify


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
        r"the file ends before its header, at byte \d+; 12 more members are lost with it",
    ),
    "cut at sample boundary": (
        _cut(lambda i: _latents(i) - 512),
        f"{MIDDLE}.safetensors",
        r"the file ends before its header, at byte \d+; 13 more members are lost with it",
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
        "photos-1-1.text.safetensors",
        r"does not match its checksum \(the text of 2 samples, photos-1-1, photos-1-3\)",
    ),
    "bit flip in padding": (
        _flip(lambda i: int(i.latents[2].sum()) + 1),
        f"{MIDDLE}.safetensors",
        "padding after it is not zero",
    ),
    "512 zero bytes over a header": (_zero(_meta_header), f"{MIDDLE}.json", "tar header is all zeros"),
    "zeros over the first header": (_zero(lambda i: 0), "photos-1-0.text.safetensors", "tar header is all zeros"),
    "empty file": (
        lambda data, index: b"",
        "photos-1-0.text.safetensors",
        r"at byte 0 \(the text of 3 samples, photos-1-0",
    ),
    "html page": (
        lambda data, index: b"<!DOCTYPE html><title>503</title>",
        "photos-1-0.text.safetensors",
        "the file ends inside its header",
    ),
    "bytes after its end": (lambda data, index: data + b"GIF89a", "", "something stands after its end"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(folder, damage):
    change, member, what = DAMAGES[damage]
    path = folder / BAD
    whole = path.read_bytes()
    path.write_bytes(bytes(change(bytearray(whole), read_index(index_of(path)))))
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
    path.write_bytes(bytes(change(bytearray(path.read_bytes()), read_index(index_of(path)))))
    index_of(path).unlink()
    checked = verify(folder)
    assert {problem.path for problem in checked.problems} == {BAD, INDEX}
    assert checked.bad == [BAD] and checked.rebuildable == []


@pytest.mark.fault(6, "a bit flipped anywhere in a shard, before `fluxfill shards verify`")
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
    index, data = read_index(index_of(path)), bytearray(path.read_bytes())
    data[int(index.latents[0, 0]) - 512 : int(index.latents[0, 0])] = bytes(512)
    for row in (2, 4):
        data[int(index.latents[row, 0]) + 300] ^= 1
    path.write_bytes(data)
    assert found(folder) == [
        (BAD, "photos-1-0.safetensors", "its tar header is all zeros: other readers take it for the end of the tar"),
        (BAD, "photos-1-2.safetensors", "does not match its checksum"),
        (BAD, "photos-1-4.safetensors", "does not match its checksum"),
    ]
