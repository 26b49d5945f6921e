import os
from pathlib import Path

import pytest

from data.cache_layout import MANIFEST, OWN_FOLDERS, SHARD_TABLE, files_of_plans, full_mask_name, index_path, tars_of


def test_a_users_own_files_are_not_among_those_that_may_be_deleted(tmp_path):
    shard = tmp_path / "shards/photos/holdout-48x64-0123456789abcdef-000003.tar"
    ours = [
        shard,
        index_path(shard, 1),
        index_path(shard, 2),
        shard.with_name(f"{shard.name}.0a1b2c3d.part"),
        tmp_path / full_mask_name("48x64"),
    ]
    ours += [tmp_path / f"{SHARD_TABLE}.0a1b2c3d.part"]
    users = [tmp_path / name for name in ("notes.txt", "blank_page.safetensors", "my.part", "shards/photos/old.tar")]
    users += [tmp_path / MANIFEST, *(tmp_path / folder / "48x64-000001.tar" for folder in OWN_FOLDERS)]
    for path in ours + users:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "shards/photos/48x64-000001.tar").mkdir()
    assert sorted(files_of_plans(tmp_path)) == sorted(ours)
    assert tars_of(tmp_path, "photos") == [shard]


def test_of_one_dataset_the_folders_of_others_are_not_looked_through(tmp_path, monkeypatch):
    """A cache of many is asked for each that may not change: thousands of files, times datasets, on a network."""
    tars = {name: tmp_path / "shards" / name / "48x64-000001.tar" for name in ("photos", "removal", "sofas")}
    for tar in tars.values():
        tar.parent.mkdir(parents=True)
        tar.touch()
    listed, scandir, listdir = [], os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path)) or scandir(path))
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(Path(path)) or listdir(path))
    assert tars_of(tmp_path, "removal") == [tars["removal"]]
    assert set(listed) <= {tars["removal"].parent}


def test_every_folder_of_a_cache_is_told_of(cache):
    """A name that is missing here is one more that a user's own pictures may have."""
    import data.cache_layout

    found = {path.name for path in cache.folder.iterdir() if path.is_dir()}
    assert found <= set(OWN_FOLDERS)
    for folder in OWN_FOLDERS:
        assert f"    {folder}/" in data.cache_layout.__doc__


@pytest.mark.parametrize(
    "tar, format_version, index",
    [
        ("/cache/shards/photos/48x64-000001.tar", 1, "/cache/shards/photos/48x64-000001.index"),
        ("/cache/shards/photos/48x64-000001.tar", 2, "/cache/index/photos/48x64-000001.index"),
        ("shards/photos/48x64-000001.tar", 2, "index/photos/48x64-000001.index"),
        ("/somewhere/else/48x64-000001.tar", 2, "/somewhere/else/48x64-000001.index"),
    ],
)
def test_since_format_2_an_index_does_not_lie_among_the_shards(tar, format_version, index):
    assert index_path(Path(tar), format_version) == Path(index)
