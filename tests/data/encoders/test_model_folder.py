import json
import re
import shutil
from pathlib import Path

import pytest

from configs.errors import InputError
from data.encoders.model_folder import (
    ENCODERS,
    PARTS,
    encoder_fingerprints,
    find_model,
    fingerprint,
    is_hub_id,
    read_part_config,
    read_part_number,
)


@pytest.fixture
def model(tmp_path):
    """A model folder as far as this file looks: every part with a config and some weights."""
    folder = tmp_path / "model"
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"part": part, "d_model": 64, "shift_factor": None}))
        (folder / part / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_whole_folder_is_found(model):
    assert find_model(str(model)) == model


@pytest.mark.parametrize("part", [*PARTS, "model_index.json"])
def test_a_part_that_is_missing_is_named(model, part):
    path = model / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=rf"model.base {model}: {model} lacks {part}\. .*fetch it again"):
        find_model(str(model))


def test_all_parts_that_are_missing_are_named(model):
    shutil.rmtree(model / "vae")
    shutil.rmtree(model / "tokenizer_2")
    with pytest.raises(InputError, match=r"lacks tokenizer_2, vae\."):
        find_model(str(model))


@pytest.mark.parametrize("base", ["/nowhere/model", "model.safetensors", "no-such-folder", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named_and_a_relative_one_with_where_it_was_looked_for(base):
    seen_from = "" if base.startswith("/") else f", seen from {re.escape(str(Path.cwd()))}"
    told = rf"model.base {base}: no such folder{seen_from}. Give a folder in diffusers' layout"
    with pytest.raises(InputError, match=told):
        find_model(base)


def test_a_single_file_is_told_how_it_becomes_a_folder(tmp_path):
    (tmp_path / "flux1-fill-dev.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"flux1-fill-dev.safetensors: is a file. `fluxfill fetch .* --out DIR` makes"):
        find_model(str(tmp_path / "flux1-fill-dev.safetensors"))


def test_a_hub_model_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"someone/some-model: neither a folder here .* `hf auth login`"):
        find_model("someone/some-model")


def test_without_a_download_only_a_copy_that_is_here_is_found(monkeypatch, tmp_path, model):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(InputError, match="someone/some-model: neither a folder here"):
        find_model("someone/some-model", download=False)
    repository = tmp_path / "hub" / "models--someone--some-model"
    shutil.copytree(model, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert find_model("someone/some-model", download=False) == repository / "snapshots" / "abc"


@pytest.mark.parametrize(
    "base, expected", [("a/b", True), ("/a/b", False), ("a/b.safetensors", False), ("a", False), ("a/b/c", False)]
)
def test_names_of_the_hub_are_told_from_paths(base, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(base) == expected
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_id("a/b")


def test_a_fingerprint_is_of_the_content_wherever_it_lies(model, tmp_path):
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(model, copy)
    (copy / "vae" / ".DS_Store").write_text("of no account")
    assert encoder_fingerprints(copy) == encoder_fingerprints(model)
    assert set(encoder_fingerprints(model)) == set(ENCODERS)


@pytest.mark.parametrize("change", ["weights", "config", "name", "size", "new file"])
def test_a_fingerprint_shows_every_change(model, change):
    part = model / "vae"
    before = fingerprint(part)
    weights = part / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if change == "weights":
        data[5000] ^= 1
        weights.write_bytes(data)
    elif change == "config":
        (part / "config.json").write_text("{}")
    elif change == "name":
        weights.rename(part / "diffusion_pytorch_model.safetensors")
    elif change == "size":
        weights.write_bytes(data + b"\0")
    else:
        (part / "added_tokens.json").write_text("{}")
    assert fingerprint(part) != before


def test_other_weights_of_the_same_size_differ_in_a_large_file_too(model):
    weights = model / "vae" / "model.safetensors"
    weights.write_bytes(bytes(20 << 20))
    before = fingerprint(model / "vae")
    with weights.open("r+b") as file:  # a single probe of 64 differs: other trainings differ in all of them
        file.seek((20 << 20) - 10)
        file.write(b"\1")
    assert fingerprint(model / "vae") != before


def test_an_empty_part_is_named(model):
    for path in (model / "vae").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"model/vae: an empty folder; the model is not complete"):
        encoder_fingerprints(model)


def test_a_parts_config_is_read_or_named(model):
    assert read_part_config(model, "vae")["part"] == "vae"
    (model / "vae" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"vae/config.json: not JSON"):
        read_part_config(model, "vae")
    (model / "vae" / "config.json").unlink()
    with pytest.raises(InputError, match=r"vae/config.json: missing; the model folder is not complete"):
        read_part_config(model, "vae")


def test_a_model_of_another_kind_is_named(model):
    assert read_part_number(model, "text_encoder_2", "d_model") == 64
    for key in ("shift_factor", "hidden_size", "part"):
        with pytest.raises(InputError, match=rf"vae/config.json: {key} is .* Point model.base at a FLUX.1 model"):
            read_part_number(model, "vae", key)
    (model / "vae" / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"d_model is None"):
        read_part_number(model, "vae", "d_model")
