import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from configs.errors import InputError
from configs.loading import dump_config
from data.cache.manifest import read_manifest
from data.cache_layout import MANIFEST, OWNER
from data.encoders.model_folder import encoder_fingerprints
from data.preprocess import main
from data.preprocessing.job import Job
from data.preprocessing.owner import Owner, owner_of, read_owner
from data.preprocessing.run import dry_run, preprocess
from tests.data.preprocessing.test_run import write_triple

QUIET = Console(quiet=True)


@pytest.fixture
def config_of(demo_config, tmp_path):
    """Makes a config of datasets of three pictures of their own each, all on one cache: `config_of("a", "b", ...)`."""

    def make(*names, run="first", overrides=()):
        for number in range(3):
            for name in names:
                write_triple(tmp_path / name, f"{name}-{number}", seed=number + 100 * ord(name))
        datasets = ", ".join(f"{{name: {n}, target: {tmp_path / n}/target, mask: {tmp_path / n}/mask}}" for n in names)
        given = [f"data.datasets=[{datasets}]", f"run.name={run}", "data.resolution=32", "data.holdout=0", *overrides]
        return demo_config(tmp_path / "cache", *given)

    return make


def samples_of(config):
    """Dataset -> samples, of the finished cache."""
    return {name: sum(counts.values()) for name, counts in read_manifest(config.data.cache).samples.items()}


def shards_of(config):
    return {path.relative_to(config.data.cache): path.read_bytes() for path in config.data.cache.glob("shards/*/*.tar")}


@pytest.mark.parametrize("run", ["first", "second"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_config_of_other_datasets_deletes_nothing_unasked(config_of, tmp_path, capsys, run, finished):
    config = config_of("a")
    preprocess(config, QUIET)
    if not finished:
        (config.data.cache / MANIFEST).unlink()
    before = shards_of(config)
    other = config_of("b", run=run)
    (tmp_path / "config.yaml").write_text(dump_config(other))
    for flags in ([], ["--dry-run"]):
        assert main(["--config", str(tmp_path / "config.yaml"), *flags]) == 2
        said = capsys.readouterr().err
        assert f"this config (run {run}) would delete, which it holds for the run first:" in said
        assert "  dataset a: 1 of its 1 shards, 3 samples\n" in said and "CONFIG --replace" in said
        assert shards_of(config) == before
    assert main(["--config", str(tmp_path / "config.yaml"), "--replace"]) == 0
    assert samples_of(other) == {"b": 3} and not list(config.data.cache.glob("shards/a/*"))


def test_a_dataset_that_its_own_config_no_longer_names_goes(config_of):
    preprocess(config_of("a", "b"), QUIET)
    with pytest.raises(
        InputError, match=r"(?s)\(run second\) would delete.* run first:\n  dataset b: 1 of its 1 shard"
    ):
        preprocess(config_of("a", run="second"), QUIET)
    only_a = config_of("a")
    preprocess(only_a, QUIET)
    assert samples_of(only_a) == {"a": 3} and not list(only_a.data.cache.glob("shards/b/*"))


def test_a_run_that_adds_a_dataset_keeps_the_others_and_owns_the_cache(config_of):
    preprocess(config_of("a"), QUIET)
    both = config_of("a", "b", run="second")
    preprocess(both, QUIET)
    assert samples_of(both) == {"a": 3, "b": 3}
    with pytest.raises(InputError, match=r"which it holds for the run second:\n  dataset b: 1 of its 1 shards"):
        preprocess(config_of("a"), QUIET)


def test_any_run_may_bring_a_cache_up_to_date_with_its_pictures(config_of, tmp_path):
    first, second = config_of("a"), config_of("a", run="second")
    preprocess(first, QUIET)
    write_triple(tmp_path / "a", "new", seed=9)
    write_triple(tmp_path / "a", "newer", seed=10)
    for path in tmp_path.glob("a/*/a-1.*"):
        path.unlink()
    preprocess(second, QUIET)
    assert samples_of(second) == {"a": 4}
    owner = read_owner(second.data.cache)
    assert owner is not None and owner.run == "first"


@pytest.mark.parametrize(
    "change",
    ["data.datasets.0.source={}/source", "data.captions.text_length=16", "data.datasets.0.mask={}/m2"],
)
def test_other_settings_make_shards_of_the_same_run_again_and_of_no_other_unasked(config_of, tmp_path, change):
    preprocess(config_of("a"), QUIET)
    shutil.copytree(tmp_path / "a" / "target", tmp_path / "a" / "source")
    for path in tmp_path.glob("a/source/*.png"):
        with Image.open(path) as picture:
            picture.paste("grey", (8, 8, 20, 24))  # the hole of `write_triple`
            picture.save(path)
    shutil.copytree(tmp_path / "a" / "mask", tmp_path / "a" / "m2")
    write_triple(tmp_path / "other", "a-0", hole=(0, 0, 9, 9))
    shutil.copy(tmp_path / "other" / "mask" / "a-0.png", tmp_path / "a" / "m2")
    given = [change.format(tmp_path / "a")]
    before = shards_of(config_of("a"))
    with pytest.raises(InputError, match=r"would delete.* run first:\n  dataset a: 1 of its 1 shards, 3 samples"):
        preprocess(config_of("a", run="second", overrides=given), QUIET)
    assert shards_of(config_of("a")) == before
    changed = config_of("a", overrides=given)
    preprocess(changed, QUIET)
    after = shards_of(changed)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())


def test_another_dataset_of_the_same_name_and_run_is_another(config_of, tmp_path):
    """Two copies of a recipe, of which one got other folders."""
    preprocess(config_of("a"), QUIET)
    config_of("b")
    folders = [f"data.datasets.0.{role}={tmp_path / 'b' / role}" for role in ("target", "mask")]
    with pytest.raises(InputError, match="  dataset a: 1 of its 1 shards, 3 samples"):
        preprocess(config_of("a", overrides=folders), QUIET)
    with pytest.raises(InputError, match="  dataset a: 1 of its 1 shards, 3 samples"):
        dry_run(config_of("a", overrides=folders), QUIET)


def test_pictures_that_moved_are_not_encoded_again(config_of, tmp_path):
    config = config_of("a")
    preprocess(config, QUIET)
    before = shards_of(config)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    folders = [f"data.datasets.0.{role}={tmp_path / 'moved' / role}" for role in ("target", "mask")]
    moved = config_of("a", run="second", overrides=folders)
    preprocess(moved, QUIET)
    assert shards_of(moved) == before
    assert read_manifest(moved.data.cache).settings["data.datasets.a.target"] == str(tmp_path / "moved" / "target")


def test_a_job_that_was_told_to_replace_goes_on_without_being_told_again(config_of, monkeypatch):
    preprocess(config_of("a"), QUIET)
    other = config_of("b", run="second")
    monkeypatch.setattr("data.preprocessing.run.encode_what_is_left", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess(other, QUIET, replace=True)
    monkeypatch.undo()
    assert len(shards_of(other)) == 1, "those of a are there"
    preprocess(other, QUIET)
    assert samples_of(other) == {"b": 3}


def test_a_cache_older_than_owners_loses_no_dataset_unasked(config_of):
    config = config_of("a")
    preprocess(config, QUIET)
    (config.data.cache / OWNER).unlink()
    with pytest.raises(InputError, match=r"\(run second\) would delete:\n  dataset a: 1 of its 1 shards, 3 samples"):
        preprocess(config_of("b", run="second"), QUIET)
    preprocess(config, QUIET)
    assert samples_of(config) == {"a": 3} and read_owner(config.data.cache)


def test_an_owner_holds_no_paths_and_differs_in_what_shapes_its_shards(config_of):
    def owner(*names, **options) -> Owner:
        config = config_of(*names, **options)
        model = Path(config.model.base)
        return owner_of(Job(config, model, encoder_fingerprints(model)))

    first = owner("a", "b")
    assert replace(owner("a", "b", run="second"), run="first") == first
    assert owner("a", "b", overrides=["train.lr=1.0", "data.captions.dropout=0.5"]) == first
    assert all(len(value) == 32 for value in [*first.pictures.values(), *first.settings.values()])
    for other in ("data.shard_size_mib=2", "data.captions.trigger=x", "data.datasets.0.flip=true"):
        changed = owner("a", "b", overrides=[other])
        assert changed.settings["a"] != first.settings["a"] and changed.pictures == first.pictures, other
