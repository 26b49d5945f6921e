import json
from dataclasses import replace

import numpy as np
import pytest

from configs.errors import InputError
from data.cache.manifest import (
    FORMAT_VERSION,
    ForeignManifest,
    read_format,
    read_manifest,
    read_shard_table,
    write_manifest,
)
from tests.payloads import canary_object


@pytest.fixture
def made_up(make_cache):
    return make_cache([("photos", "48x64", 3), ("photos", "32x32", 2, "holdout")])


def test_manifest_and_table_come_back_as_they_were_written(made_up):
    assert read_manifest(made_up.folder) == made_up.manifest
    table = read_shard_table(made_up.folder)
    assert len(table) == 2
    for name, column in vars(made_up.table).items():
        assert vars(table)[name].dtype == (np.dtypes.StringDType() if column.dtype.kind == "U" else column.dtype)
        np.testing.assert_array_equal(column, vars(table)[name])


def test_a_table_that_was_read_is_written_without_a_pickle(made_up):
    whole = (made_up.folder / "shards.npz").read_bytes()
    write_manifest(made_up.folder, made_up.manifest, read_shard_table(made_up.folder))
    assert (made_up.folder / "shards.npz").read_bytes() == whole


def test_the_manifest_is_written_last(made_up, monkeypatch):
    (made_up.folder / "manifest.json").unlink()

    def stop(*_):
        assert (made_up.folder / "shards.npz").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("data.cache.manifest.write_text_atomically", stop)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(made_up.folder, made_up.manifest, made_up.table)
    with pytest.raises(InputError, match=r"no manifest\.json, so no finished cache is there"):
        read_manifest(made_up.folder)


def test_a_newer_format_is_refused(made_up):
    path = made_up.folder / "manifest.json"
    path.write_text(json.dumps({"format_version": FORMAT_VERSION + 1, "something": "new"}))
    with pytest.raises(InputError, match=r"format version 3, this fluxfill reads up to 2. Update fluxfill"):
        read_manifest(made_up.folder)


@pytest.mark.fault(6, "a bit of the manifest flipped")
def test_a_flipped_bit_in_the_manifest_is_named(made_up):
    path = made_up.folder / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"manifest.json: "):
            read_manifest(made_up.folder)
    path.write_bytes(whole.replace(b'"vae_scale": 0.3611', b'"vae_scale": 0.3511'))
    with pytest.raises(InputError, match=r"manifest.json: damaged \(its checksum differs\). .* whole shards are kept"):
        read_manifest(made_up.folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "<!DOCTYPE html>", '{"format_version": 1, "checksum": "0"}', "null"]
)
def test_a_manifest_that_is_none_is_named(made_up, content):
    (made_up.folder / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest.json: damaged .*Run `fluxfill preprocess CONFIG` again"):
        read_manifest(made_up.folder)


@pytest.mark.fault(6, "a bit of the table of shards flipped")
def test_a_flipped_bit_in_the_shard_table_is_named_or_changes_nothing(made_up):
    path = made_up.folder / "shards.npz"
    whole = path.read_bytes()
    named = 0
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        try:
            table = read_shard_table(made_up.folder)
        except InputError as error:
            named += "shards.npz: " in str(error)
            continue
        for name, column in vars(made_up.table).items():  # it hit a date or the like
            np.testing.assert_array_equal(column, vars(table)[name])
    assert named > len(whole) / 5 / 2


@pytest.mark.fault(27, "objects, which are pickles, in the table of a cache's shards")
@pytest.mark.parametrize("damage", ["missing", "empty", "html", "cut", "objects", "column", "lengths"])
def test_a_damaged_shard_table_is_named(made_up, damage):
    path = made_up.folder / "shards.npz"
    columns = dict(vars(made_up.table))
    if damage == "missing":
        path.unlink()
    elif damage in ("empty", "html"):
        path.write_text("" if damage == "empty" else "<!DOCTYPE html>")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "objects":
        np.savez(path, **columns | {"plan": np.array([canary_object(path.with_name("canary"))] * 2)})  # a pickle
    elif damage == "column":
        del columns["plan"]
        np.savez(path, **columns)
    else:
        np.savez(path, **columns | {"plan": columns["plan"][:1]})
    with pytest.raises(InputError, match=r"shards.npz: .*Run `fluxfill preprocess CONFIG` again"):
        read_shard_table(made_up.folder)
    assert not path.with_name("canary").exists()


@pytest.mark.fault(27, "the same in the table of shards")
@pytest.mark.parametrize(
    "column, value",
    [
        ("path", "../shards/a.tar"),
        ("path", "/shards/a.tar"),
        ("path", "shards/../../a.tar"),
        ("path", "manifest.json"),
        ("sha256", "../../mine"),
        ("sha256", ""),
        ("sha256", "a" * 63 + "/"),
        ("sha256", "a" * 65),
    ],
)
def test_a_shard_table_names_nothing_outside_of_the_cache(made_up, column, value):
    columns = dict(vars(made_up.table))
    columns[column] = np.array([value, columns[column][1]])
    np.savez(made_up.folder / "shards.npz", **columns)
    with pytest.raises(InputError, match=r"shards.npz: damaged \((names a file outside of the cache: |has a sha256)"):
        read_shard_table(made_up.folder)


@pytest.mark.fault(27, "names in tables and manifests that lead out of their folder")
@pytest.mark.parametrize("name", ["../../../outside.txt", "/outside.txt", "validation/../../outside.txt"])
def test_a_manifest_names_nothing_outside_of_the_cache(made_up, monkeypatch, name):
    monkeypatch.setattr("data.cache.manifest.hash_files", lambda *_: {name: "0" * 32})
    write_manifest(made_up.folder, made_up.manifest, made_up.table)
    with pytest.raises(InputError, match=r"manifest.json: damaged \(names a file outside of the cache: .*outside.txt"):
        read_manifest(made_up.folder)


def test_a_manifest_knows_its_samples(cache):
    assert {name: sum(counts) for name, counts in cache.manifest.hole_fractions.items()} == {"photographs": 96}
    assert cache.manifest.samples == {"photographs": {"train": 48, "holdout": 48}}
    assert replace(cache.manifest, encoders={}) != cache.manifest


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "an app", "files": {}}',
        '{"state.json": "0123"}',
        '[{"file": "a.jpg"}]',
        '"some text"',
        '{"checksum": "0123", "files": []}',
        '{"format_version": "1.0", "checksum": "0123"}',
        '{"format_version": 1, "name": "an app"}',
    ],
)
def test_a_manifest_of_another_program_is_not_taken_for_a_damaged_one(tmp_path, content):
    """Preprocessing would delete it."""
    (tmp_path / "manifest.json").write_text(content)
    for read in (read_format, read_manifest):
        with pytest.raises(ForeignManifest, match=r"manifest\.json: another program's.* Point data\.cache at"):
            read(tmp_path)


def test_a_folder_in_the_place_of_the_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(InputError, match=r"manifest\.json: cannot be read \(Is a directory\)\. .*point data\.cache at"):
        read_format(tmp_path)


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty manifest", "a manifest that was cut"])
def test_of_no_cache_yet_and_of_a_damaged_one_the_format_is_that_of_its_shards(made_up, there):
    cache = made_up.folder
    manifest = cache / "manifest.json"
    if there in ("nothing", "a file"):
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[: 0 if there == "an empty manifest" else 100])
    assert read_format(cache / "shards.npz" if there == "a file" else cache) == FORMAT_VERSION
    (cache / "shards" / "cats").mkdir(parents=True, exist_ok=True)
    (cache / "shards" / "cats" / "48x64-000001.index").write_bytes(b"")
    assert read_format(cache) == 1
