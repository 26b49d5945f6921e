import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from tests.trainer.adapters.live_models import lora
from tests.trainer.export.made_checkpoints import WHOLE, change_base, make_checkpoint
from trainer.export.trained import open_trained, whole_tensors

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_the_tensors_are_the_live_models(tiny_model, tmp_path):
    folder, live = make_checkpoint(tiny_model, lora(), tmp_path / "run")
    trained = open_trained(folder, "live")
    assert all(torch.equal(trained.read_live(name), parameter) for name, parameter in live.named_parameters())
    average = open_trained(folder, "ema")
    assert all(
        torch.equal(average.read_live(name), parameter * (2 if parameter.requires_grad else 1))
        for name, parameter in live.named_parameters()
    )
    assert all(parameter.is_meta for parameter in trained.live.parameters())


def test_of_a_full_fine_tune_nothing_is_the_bases(tiny_model, tmp_path):
    folder, live = make_checkpoint(tiny_model, WHOLE, tmp_path / "run")
    expected = dict(live.named_parameters())
    found = dict(whole_tensors(open_trained(folder, "live")))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_devs_input_layer_is_expanded(tiny_dev_model, tmp_path):
    trained = open_trained(make_checkpoint(tiny_dev_model, lora(), tmp_path / "run", expanded=True)[0], "live")
    weight = trained.read_base("x_embedder.weight")
    assert weight.shape[1] == 384 and weight[:, :64].any() and not weight[:, 64:].any()


def test_another_base_of_the_same_shapes_is_refused(tiny_model, tmp_path):
    folder, _ = make_checkpoint(tiny_model, lora(), tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tensors = load_file(other / WEIGHTS)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, other / WEIGHTS, {"format": "pt"})
    change_base(folder, other)
    with pytest.raises(InputError, match=r"trained on other weights than those of .*other.*Put the base back"):
        open_trained(folder, "live")


def test_a_full_fine_tune_needs_of_its_base_the_shapes_alone(tiny_model, tmp_path):
    folder, live = make_checkpoint(tiny_model, WHOLE, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tensors = load_file(other / WEIGHTS)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, other / WEIGHTS, {"format": "pt"})
    change_base(folder, other)
    assert torch.equal(open_trained(folder, "live").read_whole("proj_out.bias"), live.proj_out.bias)


@pytest.mark.parametrize("damage", ["cut", "missing", "reshaped"])
def test_a_base_that_is_not_whole_is_told(tiny_model, tmp_path, damage):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    folder, _ = make_checkpoint(model, lora(), tmp_path / "run")
    tensors = load_file(model / WEIGHTS)
    if damage == "cut":
        (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-10])
    else:
        bias = {} if damage == "missing" else {"proj_out.bias": torch.zeros(3)}
        rest = {name: tensor.clone() for name, tensor in tensors.items() if name != "proj_out.bias"}
        save_file(rest | bias, model / WEIGHTS, {"format": "pt"})
    state = json.loads((folder / "state.json").read_text())
    state["state"]["base"] = None  # as in checkpoints from before it was kept: then the files themselves must tell
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"cannot be read|proj_out\.bias is missing or of another shape"):
        open_trained(folder, "live")
