import os
from pathlib import Path

from launch.check.paths import check_folder, check_paths, existing


def test_folders_that_can_be_written_or_made_are_right_and_stay_as_they_are(situate, folder):
    before = sorted(os.listdir(folder))
    checks = list(check_paths(situate()))
    assert [made.state for made in checks] == ["ok", "ok"] and "can be made" in checks[0].what
    assert sorted(os.listdir(folder)) == before


def test_a_run_that_would_go_on_is_told(situate, folder):
    for step in (10, 20):
        marker = folder / "runs" / "demo" / "checkpoints" / f"step-{step:08d}" / "COMPLETE"
        marker.parent.mkdir(parents=True)
        marker.touch()
    told = f"{folder / 'runs' / 'demo'} is a run already: it goes on from step-00000020, or give another run.name"
    assert told in [made.what for made in check_paths(situate())]
    marker.parent.rename(marker.parent.with_suffix(".undone"))
    assert any("goes on from step-00000010," in made.what for made in check_paths(situate()))


def test_a_file_in_the_way_and_a_folder_that_takes_nothing_are_named(tmp_path):
    (tmp_path / "file").touch()
    for place, words in ((tmp_path / "file" / "runs", "it is a file"), (Path("/proc/x"), "/proc")):
        made = check_folder("run.dir", place)
        assert made.state == "error" and words in made.what and "run.dir" in made.cure


def test_copies_and_the_adapter_to_start_from_are_looked_at(situate, tmp_path):
    checks = check_paths(
        situate(
            "data.cache=https://host/cache",
            f"data.local_cache={tmp_path}",
            f"method={{type: lora, init_from: {tmp_path / 'gone.safetensors'}}}",
        )
    )
    told = {made.what: made.state for made in checks}
    assert told[f"data.local_cache {tmp_path} can be written"] == "ok"
    assert told[f"method.init_from {tmp_path / 'gone.safetensors'}: there is no such file"] == "error"


def test_the_nearest_folder_that_exists_is_found(tmp_path):
    assert existing(tmp_path / "a" / "b") == tmp_path == existing(tmp_path)
    assert existing(tmp_path / ("long" * 100) / "b") == tmp_path, "a name that no filesystem takes"
