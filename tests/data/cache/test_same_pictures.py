import json
import logging
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from configs.cache_settings import picture_settings
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from data.cache.manifest import read_manifest, read_shard_table, write_manifest
from data.cache.open_cache import open_cache
from data.preprocessing.run import preprocess

ROLES = ("target", "mask", "source")
NAMES = [f"picture-{number}" for number in range(4)]


def write_pictures(folder: Path, *, lacking: str = "", turned: str = "") -> None:
    """Four triples as folders, as a tar, and as a table of the folders' files.

    lacking: name of one to leave out.  turned: role of one picture that is upside down.
    """
    names = [name for name in NAMES if name != lacking]
    for number, name in enumerate(NAMES):
        noise = np.random.default_rng(number).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[8:20, 8:24] = 255
        source = np.where(mask[..., None] == 255, noise[1], noise[0])
        for role, pixels in (("target", noise[0]), ("source", source), ("mask", mask)):
            (folder / role).mkdir(parents=True, exist_ok=True)
            if name in names:
                upright = role != turned or name != NAMES[2]
                Image.fromarray(pixels if upright else pixels[::-1]).save(folder / role / f"{name}.png")
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for name in names:
            for role in ROLES:
                tar.add(folder / role / f"{name}.png", f"{name}.{role}.png")
    rows = [{role: f"{role}/{name}.png" for role in ROLES} for name in names]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


PICTURE_KEYS = picture_settings(DatasetConfig(name="noise", table="any.jsonl")).keys()
SOURCES = {
    "folders": "target: {0}/target, mask: {0}/mask, source: {0}/source",
    "tars": "tars: [{0}/pictures.tar], members: {{source: source.png}}",
    "table": "table: {0}/rows.jsonl, columns: {{source: source}}",
}


@pytest.fixture(params=SOURCES)
def kind(request):
    return request.param


@pytest.fixture
def made(kind, demo_config, tmp_path):
    """Makes configs of a cache that was made from tmp_path/a, by the folder of the pictures: `made(folder)`."""

    def config_of(folder: Path):
        dataset = f"{{name: noise, {SOURCES[kind].format(folder)}}}"
        return demo_config(tmp_path / "cache", f"data.datasets=[{dataset}]", "data.resolution=32", "data.holdout=0")

    write_pictures(tmp_path / "a")
    preprocess(config_of(tmp_path / "a"), Console(quiet=True))
    return config_of


def reopen(config):
    return open_cache(config, Path(config.model.base))


def test_pictures_may_lie_elsewhere_if_they_are_the_same(made, tmp_path, caplog):
    shutil.move(tmp_path / "a", tmp_path / "b")
    with caplog.at_level(logging.INFO):
        assert reopen(made(tmp_path / "b")).manifest == reopen(made(tmp_path / "a")).manifest
    (told,) = caplog.records
    assert told.levelname == "INFO" and told.getMessage().endswith("; 4 pictures there are those of the cache")


@pytest.mark.parametrize("role", ROLES)
def test_other_pictures_elsewhere_are_refused(made, kind, tmp_path, role):
    write_pictures(tmp_path / "b", turned=role)
    with pytest.raises(InputError) as caught:
        reopen(made(tmp_path / "b"))
    said = str(caught.value)
    key = {"folders": "target", "tars": "tars", "table": "table"}[kind]
    assert f"data.datasets.noise.{key} is " in said and "the cache was made from" in said
    assert str(tmp_path / "b") in said and str(tmp_path / "a") in said
    assert NAMES[2] in said and "is another.\nRun `fluxfill preprocess CONFIG` to encode them" in said


@pytest.mark.parametrize("index", ["is gone", "is damaged"])
def test_pictures_are_compared_whatever_became_of_an_index(made, tmp_path, caplog, index):
    """It is rebuilt; a damaged one is told, by its path, and is for who reads its shard to judge."""
    shutil.move(tmp_path / "a", tmp_path / "b")
    (file,) = (tmp_path / "cache" / "index").rglob("*.index")
    before = file.read_bytes()
    file.write_bytes(before[: len(before) // 2])
    if index == "is gone":
        file.unlink()
    with caplog.at_level(logging.INFO):
        reopen(made(tmp_path / "b"))
    (told,) = caplog.records
    if index == "is gone":
        assert told.getMessage().endswith("; 4 pictures there are those of the cache") and file.read_bytes() == before
    else:
        assert "could not be found out" in told.getMessage() and str(file) in told.getMessage()


def test_pictures_that_are_not_all_there_are_refused(made, tmp_path):
    write_pictures(tmp_path / "b", lacking=NAMES[1])
    with pytest.raises(InputError, match=r"picture-1\.(target\.)?png is not there\.\nRun `fluxfill preprocess CONFIG`"):
        reopen(made(tmp_path / "b"))


def test_places_that_are_not_on_this_machine_are_named_and_trained_on(made, tmp_path, caplog):
    reopen(made(Path("/mnt/elsewhere")))
    (told,) = caplog.records
    assert told.levelname == "WARNING"
    assert "/mnt/elsewhere" in told.getMessage() and "the cache was made from" in told.getMessage()
    assert "is not on this machine): this run trains on what the cache holds" in told.getMessage()


def test_a_cache_that_does_not_name_its_places_is_compared_by_its_pictures(made, tmp_path):
    """As those that were made before it was written down."""
    folder = tmp_path / "cache"
    manifest = read_manifest(folder)
    older = {key: value for key, value in manifest.settings.items() if key not in PICTURE_KEYS}
    assert len(older) == len(manifest.settings) - len(PICTURE_KEYS)
    write_manifest(folder, replace(manifest, settings=older), read_shard_table(folder))
    reopen(made(tmp_path / "a"))
    write_pictures(tmp_path / "b", turned="source")
    with pytest.raises(InputError, match="the cache does not name its own"):
        reopen(made(tmp_path / "b"))
