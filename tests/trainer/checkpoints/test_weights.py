import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from tests.trainer.adapters.live_models import lora
from tests.trainer.export.made_checkpoints import WHOLE, make_checkpoint
from trainer.checkpoints.tensor_files import StateFiles
from trainer.checkpoints.weights import open_weights

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """(a checkpoint of a LoRA, its parameters, their shapes)."""
    folder, live = make_checkpoint(tiny_model, lora(), tmp_path / "run")
    trained = {name: parameter.detach() for name, parameter in live.named_parameters() if parameter.requires_grad}
    return folder, trained, {name: tensor.shape for name, tensor in trained.items()}


def test_they_are_those_that_were_saved(adapter, tiny_model):
    folder, trained, shapes = adapter
    live, average = (open_weights(folder, kind, shapes, tiny_model, is_adapter=True) for kind in ("live", "ema"))
    assert all(torch.equal(live(name), tensor) for name, tensor in trained.items())
    assert all(torch.equal(average(name), 2 * tensor) for name, tensor in trained.items())


def test_without_an_average_there_is_none(adapter, tiny_model, monkeypatch):
    folder, _, shapes = adapter
    monkeypatch.setattr(StateFiles, "kinds", lambda self: {"weight"})
    with pytest.raises(InputError, match=r"no moving average.*Give --weights live"):
        open_weights(folder, "ema", shapes, tiny_model, is_adapter=True)


def test_a_model_of_other_parameters_is_refused(adapter, tiny_model):
    folder, _, shapes = adapter
    shapes.popitem()
    with pytest.raises(InputError, match=r"trained another model than .*their tensors differ\. Put the base back"):
        open_weights(folder, "live", shapes, tiny_model, is_adapter=True)


def test_an_adapter_is_for_the_base_that_it_trained_on_and_a_whole_model_for_any_of_its_shapes(
    adapter, tiny_model, tmp_path
):
    folder, _, shapes = adapter
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tensors = load_file(other / WEIGHTS)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, other / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=r"trained on other weights than those of .*other, though of the same shapes"):
        open_weights(folder, "live", shapes, other, is_adapter=True)
    whole, live = make_checkpoint(tiny_model, WHOLE, tmp_path / "whole")
    shapes = {name: parameter.shape for name, parameter in live.named_parameters()}
    read = open_weights(whole, "live", shapes, other, is_adapter=False)
    assert torch.equal(read("proj_out.bias"), live.proj_out.bias)
