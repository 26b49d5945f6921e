"""Shards and indexes that are lost, swapped, unreadable or contradict each other."""

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest

from data.cache.shard_index import read_index, write_index
from tests.data.made_caches import index_of
from tests.data.verify.verified import BAD, INDEX, found, verify


def test_a_missing_shard_is_named(folder):
    (folder / BAD).unlink()
    assert found(folder) == [(BAD, "", "missing")]
    index_of(folder / BAD).unlink()
    assert found(folder) == [(INDEX, "", "missing"), (BAD, "", "missing")]


def test_a_shard_in_the_place_of_another_is_noticed(folder):
    other = folder / "shards/photos/48x64-000000.tar"
    shutil.copy(other, folder / BAD)
    shutil.copy(index_of(other), folder / INDEX)
    names = {path: what for path, _, what in found(folder)}
    assert names[INDEX] == "belongs to another shard"
    assert "its sha256 differs" in names[BAD]


def test_a_shard_that_cannot_be_read_is_named(folder, monkeypatch):
    class Failing(io.FileIO):
        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("data.verify.shard.io.FileIO", Failing)
    assert (BAD, "", "cannot be read (Input/output error)") in found(folder)


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
        ("text_row", "photos-1-4.json: does not fit its shard: says text, tokens and hole fractions are"),
        ("text_row of the first", "photos-1-1.text.safetensors: does not fit its shard: the index places 16 bytes at"),
        ("hole_fraction", "photos-1-1.json: does not fit its shard: says text, tokens and hole fractions are"),
        ("keys", "photos-1-x.safetensors: does not fit its shard: its tar header says photos-1-1.safetensors"),
        ("plan", ": plan 0123456789abcdef0123456789abcdef, the manifest says"),
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
        column, *is_first = column.split(" of ")
        value = columns[column]
        if column == "latents":
            value[1, 0] += 512
        elif column == "text_row":
            value[1 if is_first else 4] ^= 1
        else:
            value[1] += value.dtype.type(1) if column != "hole_fraction" else np.float32(0.01)
        changed = replace(index, **{column: value})
    write_index(folder / INDEX, changed)
    checked = verify(folder)
    said = [f"{problem.member}: {problem.what}" for problem in checked.problems if problem.path == INDEX]
    assert any(what in line for line in said), said
    assert [whole.path for whole in checked.rebuildable] == [BAD] and BAD not in checked.bad
