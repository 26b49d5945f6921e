import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.schema import LoraConfig
from tests.trainer.export.trained_models import change_one_number, trained_model
from trainer.adapters.build import add_adapter
from trainer.adapters.files import ADAPTER, WEIGHTS_NAME, save_adapter
from trainer.export.verify import verify_adapter, verify_model
from trainer.model.flux import load_transformer

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("value", [0.123, float("nan")])
def test_one_changed_number_in_an_exported_model_is_found(tiny_model, exported, value):
    transformer = trained_model(tiny_model)
    verify_model(transformer, exported, weights=transformer.named_parameters(), dtype=torch.float32)
    change_one_number(exported / WEIGHTS, value)
    with pytest.raises(RuntimeError, match="1 tensors came back different"):
        verify_model(transformer, exported, weights=transformer.named_parameters(), dtype=torch.float32)


def test_a_tensor_that_is_missing_in_an_exported_model_is_found(tiny_model, exported):
    tensors = load_file(exported / WEIGHTS)
    del tensors["proj_out.bias"]
    save_file(tensors, exported / WEIGHTS)
    transformer = trained_model(tiny_model)
    with pytest.raises(RuntimeError, match=r"proj_out\.bias"):
        verify_model(transformer, exported, weights=transformer.named_parameters(), dtype=torch.float32)


# --- an adapter -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["fill", "dev"])
def adapted(request, tmp_path):
    """(transformer with a trained adapter, its model folder, the adapter's folder)."""
    dev = request.param == "dev"
    model = request.getfixturevalue("tiny_dev_model" if dev else "tiny_model")
    transformer = load_transformer(model, dtype=torch.float32)
    add_adapter(transformer, LoraConfig(type="lora", rank=4, alpha=12), expanded=dev, seed=0)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    save_adapter(transformer, tmp_path / "final")
    return transformer, model, tmp_path / "final"


def test_a_good_adapter_passes_and_the_live_one_is_as_before(adapted, recwarn, caplog, monkeypatch):
    transformer, model, folder = adapted
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    trains = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    transformer.train()
    verify_adapter(transformer, model, folder)
    assert not [*recwarn, *(record for record in caplog.records if record.levelno >= logging.WARNING)]
    assert transformer.training
    assert list(transformer.peft_config) == [ADAPTER]
    assert transformer.active_adapters() == [ADAPTER]
    assert [name for name, parameter in transformer.named_parameters() if parameter.requires_grad] == trains
    assert all(torch.equal(before[name], parameter) for name, parameter in transformer.named_parameters())


@pytest.mark.parametrize("value", [5.0, float("nan")])
def test_one_changed_number_in_an_adapter_is_found(adapted, value):
    transformer, model, folder = adapted
    change_one_number(folder / WEIGHTS_NAME, value)
    with pytest.raises(RuntimeError, match="gives another output"):
        verify_adapter(transformer, model, folder)
    assert list(transformer.peft_config) == [ADAPTER]
