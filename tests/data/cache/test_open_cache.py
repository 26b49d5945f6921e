import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from data.cache.open_cache import open_cache
from data.verify.cache import refuse_no_cache
from tests.other_user import as_nobody


@pytest.fixture
def copied(cache, demo_config, tmp_path):
    """A config whose cache may be damaged."""
    folder = tmp_path / "cache"
    shutil.copytree(cache.folder, folder)
    return demo_config(folder)


@pytest.fixture
def public(cache, demo_config, monkeypatch):
    """The same where any user may go, as pytest's folders are root's alone; so is the model."""
    monkeypatch.setattr("data.cache.open_cache.refuse_other_settings", lambda *_: None)
    with TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = shutil.copytree(cache.folder, Path(place) / "cache")
        folder.chmod(0o755)
        yield demo_config(folder)


def open_again(config):
    return open_cache(config, Path(config.model.base))


def test_a_whole_cache_opens(copied, cache):
    opened = open_again(copied)
    assert opened.folder == copied.data.cache
    assert opened.manifest == cache.manifest
    assert opened.table.samples.sum() == 96


def test_a_cache_made_by_another_vae_is_refused(copied, tmp_path):
    other = tmp_path / "other-model"
    shutil.copytree(copied.model.base, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + torch.full_like(tensors[name], 0.01)}, weights)
    with pytest.raises(InputError) as caught:
        open_cache(copied, other)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"data.cache {copied.data.cache} was made by other settings:"
    assert lines[1].startswith("  vae of model.base ") and "is not the one that encoded the cache" in lines[1]
    assert lines[2].startswith("Run `fluxfill preprocess CONFIG` again, or point data.cache (or model.base)")
    assert len(lines) == 3, "the VAE alone is another"


def test_every_setting_that_differs_is_named(copied, demo_config):
    changed = [
        "data.resolution=[64,128]",
        "data.holdout=5",
        "data.captions.trigger=sks",
        "data.captions.text_length=16",
    ]
    with pytest.raises(InputError) as caught:
        open_again(demo_config(copied.data.cache, *changed))
    for key, now, before in (
        ("data.resolution", r"[64, 128]", "[64]"),
        ("data.holdout", "5", "48"),
        ("data.captions.trigger", "'sks'", "None"),
        ("data.captions.text_length", "16", "32"),
    ):
        assert f"{key} is {now}, the cache was made with {before}" in str(caught.value)


@pytest.mark.parametrize(
    "change, found",
    [
        ("data.datasets.0.source=null", "source is None, the cache was made with '/.*/source'"),
        ("data.datasets.0={name: photographs, tars: /a.tar}", "tars is \\['/a.tar'\\], the cache was made with None"),
        (
            "data.datasets.0={name: photographs, table: /a.jsonl, columns: {source: before}}",
            "columns is {'source': 'before'}, the cache was made with None",
        ),
    ],
)
def test_pictures_of_another_kind_are_refused(copied, demo_config, change, found):
    with pytest.raises(InputError, match=f"data.datasets.photographs.{found}"):
        open_again(demo_config(copied.data.cache, change))


def test_settings_that_shape_no_tensor_may_change(copied, demo_config):
    free = ["data.captions.dropout=0.5", "data.datasets.0.weight=3", "data.shard_size_mib=7", "train.lr=1.0"]
    open_again(demo_config(copied.data.cache, *free))


def test_a_folder_without_a_cache_is_named(demo_config, tmp_path):
    config = demo_config(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"nothing: no manifest.json.*Run `fluxfill preprocess CONFIG` first"):
        open_again(config)


@pytest.mark.fault(5, "cut before the start, with others missing")
def test_every_shard_that_is_missing_or_cut_is_named(copied, cache):
    paths = [copied.data.cache / path for path in cache.table.path]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_text("<!DOCTYPE html><title>503</title>")
    with paths[3].open("r+b") as file:
        file.truncate(paths[3].stat().st_size - 1)
    with pytest.raises(InputError) as caught:
        open_again(copied)
    lines = str(caught.value).splitlines()
    sizes = cache.table.bytes
    assert lines[:-1] == [
        f"{paths[0]}: missing",
        f"{paths[1]}: 0 bytes, the manifest says {sizes[1]}",
        f"{paths[2]}: 33 bytes, the manifest says {sizes[2]}",
        f"{paths[3]}: {sizes[3] - 1} bytes, the manifest says {sizes[3]}",
    ]
    assert "only those are encoded again" in lines[-1]


@pytest.mark.parametrize("closed", [".", "manifest.json", "shards.npz", "shards"])
def test_a_cache_that_this_user_may_not_read_is_said_to_be_so_and_not_to_be_damaged(public, closed):
    place = public.data.cache / closed
    mode = place.stat().st_mode
    place.chmod(0)
    told = rf"{closed.strip('.')}.*: cannot be read \(Permission denied\)\. .*chmod -R a\+rX {public.data.cache}"
    try:
        with as_nobody():
            with pytest.raises(InputError, match=told):
                open_again(public)
            if closed == ".":
                with pytest.raises(InputError, match=told):
                    refuse_no_cache(public.data.cache)
    finally:
        place.chmod(mode)
