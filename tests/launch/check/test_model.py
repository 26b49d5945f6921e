import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from configs.flux_shape import FluxShape
from launch.check.model import check_model, find_local_model, published_sizes, read_weights

HUB_ID = "black-forest-labs/FLUX.1-Fill-dev"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache of nobody who is logged in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return tmp_path / "hub"


def split(part: Path, stem: str = "diffusion_pytorch_model") -> None:
    """Write a part's weights as two files and an index, as large models come."""
    whole = part / f"{stem}.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, part / file)
        weight_map |= dict.fromkeys(half, file)
    (part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()


@pytest.mark.parametrize("kind, words", [("tiny_model", "FLUX.1-Fill"), ("tiny_dev_model", "to be expanded to 384")])
def test_a_whole_model_is_right(kind, words, request):
    model, checks = check_model(request.getfixturevalue(kind))
    assert [made.state for made in checks] == ["ok"] and words in checks[0].what
    assert model is not None and model.sizes.shape.blocks == 6 and model.sizes.vae > 1e6 and model.sizes.text > 1e5


def test_a_model_in_several_files_is_right_until_one_is_gone_or_cut_off(model):
    split(model / "transformer")
    _, checks = check_model(model)
    assert [made.state for made in checks] == ["ok"]
    last = model / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    _, checks = check_model(model)
    assert any("data is cut off" in made.what and last.name in made.what for made in checks)
    last.unlink()
    _, checks = check_model(model)
    assert any("missing, though" in made.what and last.name in made.what for made in checks)


def test_weights_that_lack_tensors_or_are_of_another_model_are_named(model):
    part = model / "transformer"
    split(part)
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["extra.weight"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index.write_text(json.dumps(listed))
    assert "lacks extra.weight" in read_weights(part, "diffusion_pytorch_model")[1][0].what
    index.write_text("[]")
    assert "no index of weights" in read_weights(part, "diffusion_pytorch_model")[1][0].what


def test_a_config_that_belongs_to_other_weights_is_named(model):
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 3}))
    _, checks = check_model(model)
    (made,) = [made for made in checks if made.state == "error"]
    assert "5,275,584 parameters" in made.what and "do not belong together" in made.cure


def test_text_encoders_of_another_model_are_named(model):
    path = model / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_model": 128}))
    _, checks = check_model(model)
    assert any(
        made.name == "encoders" and "d_model is 128, and the transformer takes 64" in made.what for made in checks
    )


def test_pickled_weights_are_not_read(model):
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "diffusion_pytorch_model.bin")
    _, checks = check_model(model)
    assert any("pickles can hold programs" in made.what for made in checks)


def test_a_gated_model_that_is_not_here_says_where_to_accept_its_licence(hub):
    folder, made = find_local_model(HUB_ID)
    assert folder is None and made.state == "error"
    assert f"https://huggingface.co/{HUB_ID}" in made.cure and "hf auth login" in made.cure
    assert f"`fluxfill fetch {HUB_ID}`" in made.cure


def test_offline_the_hub_is_not_named_as_a_way(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, made = find_local_model(HUB_ID)
    assert folder is None and "HF_HUB_OFFLINE is set" in made.what and "where there is a network" in made.cure


def test_a_copy_in_the_hub_cache_is_found_and_a_half_one_is_not(hub, tiny_model):
    revision = "0" * 40
    repository = hub / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(tiny_model, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    folder, made = find_local_model(HUB_ID)
    assert folder == repository / "snapshots" / revision and made.state == "ok"
    shutil.rmtree(folder / "vae")
    assert find_local_model(HUB_ID)[0] is None


def test_sizes_of_published_models_are_known_by_name():
    sizes = published_sizes(HUB_ID)
    assert sizes is not None and sizes.shape == FluxShape()
    assert published_sizes("somebody/else") is None
