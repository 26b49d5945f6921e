from data.cache_layout import MANIFEST, OWN_FOLDERS, SHARD_TABLE, files_of_plans, full_mask_name, index_path


def test_a_users_own_files_are_not_among_those_that_may_be_deleted(tmp_path):
    shard = tmp_path / "shards/photos/holdout-48x64-0123456789abcdef-000003.tar"
    ours = [
        shard,
        index_path(shard),
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


def test_every_folder_of_a_cache_is_told_of(cache):
    """A name that is missing here is one more that a user's own pictures may have."""
    import data.cache_layout

    found = {path.name for path in cache.folder.iterdir() if path.is_dir()}
    assert found <= set(OWN_FOLDERS)
    for folder in OWN_FOLDERS:
        assert f"    {folder}/" in data.cache_layout.__doc__
