import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from data.encoders.model_folder import fingerprint
from tests.model_files import split_transformer
from trainer.model.base_fingerprint import base_fingerprint, is_base


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the demo's model, to be changed."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_other_files_another_program_and_another_place_are_the_same_base(model, tiny_model):
    split_transformer(model)
    config = model / "transformer" / "config.json"
    told = json.loads(config.read_text())
    told |= {"_diffusers_version": "9.9.9", "_name_or_path": "/elsewhere", "of_a_later_release": None}
    config.write_text(json.dumps(told, sort_keys=True))
    assert fingerprint(model / "transformer") != fingerprint(tiny_model / "transformer"), "the files do differ"
    assert base_fingerprint(model) == base_fingerprint(tiny_model)
    assert is_base(model, base_fingerprint(tiny_model))


def test_what_was_kept_as_the_files_were_is_still_known(model):
    assert is_base(model, fingerprint(model / "transformer"))
    assert not is_base(model, "0" * 32)


@pytest.mark.parametrize("change", ["one number of every tensor", "a tensor", "dtype", "shape", "name", "config"])
def test_another_content_is_another_base(model, change):
    before, part = base_fingerprint(model), model / "transformer"
    (file,) = part.glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    if change == "one number of every tensor":
        for tensor in tensors.values():
            tensor.view(-1)[0] += 1
    elif change == "a tensor":
        del tensors[name]
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.bfloat16)
    elif change == "shape":
        tensors[name] = tensors[name].flatten()
    elif change == "name":
        tensors["another"] = tensors.pop(name)
    else:
        config = json.loads((part / "config.json").read_text())
        (part / "config.json").write_text(json.dumps(config | {"attention_head_dim": 1}))
    save_file(tensors, file, {"format": "pt"})
    assert base_fingerprint(model) != before


def test_a_change_far_into_a_large_tensor_is_seen(model):
    """Of a tensor above 64 MiB more than its beginning is read."""
    (file,) = (model / "transformer").glob("*.safetensors")
    large = torch.zeros(80 << 20, dtype=torch.uint8)
    save_file({"large": large}, file)
    before = base_fingerprint(model)
    large[(64 << 20) + 100] = 1
    save_file({"large": large}, file)
    assert base_fingerprint(model) != before


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"])
def test_a_broken_or_missing_file_is_named(model, damage):
    (file,) = (model / "transformer").glob("*.safetensors")
    file.write_bytes(damage)
    with pytest.raises(InputError, match=rf"{file.name}: no whole safetensors file \(.*\)\. Fetch the model again"):
        base_fingerprint(model)
    file.unlink()
    with pytest.raises(InputError, match=r"transformer: no safetensors file is there.*Fetch the model again"):
        base_fingerprint(model)
