"""An adapter is right if a stranger's FluxFillPipeline, given the folder, paints what the trainer's model painted."""

import json
import re

import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from tests.trainer.adapters.live_models import (
    METHODS,
    NO_TEXT,
    adapted,
    adapter_of,
    assert_same_output,
    lora,
    reloaded_velocity,
    train_a_little,
    velocity_of,
)
from trainer.adapters.files import WEIGHTS_NAME, adapter_tensors, file_tensors, save_adapter, widens_input

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.mark.parametrize(
    "alpha, targets", [(2.0, "attention+mlp"), (12.0, "attention"), (4.0, ["x_embedder", "to_v", "proj_out"])]
)
def test_a_fresh_pipeline_with_a_lora_gives_the_live_models_output(tiny_model, tmp_path, rows, alpha, targets):
    live = adapted(tiny_model, lora(alpha=alpha, targets=targets))
    train_a_little(live)
    save_adapter(live, tmp_path)
    assert_same_output(reloaded_velocity(tiny_model, tmp_path, rows), velocity_of(live, rows))


@each_method
def test_a_fresh_pipeline_with_the_adapter_gives_the_live_models_output(tiny_model, tmp_path, rows, method):
    live = adapted(tiny_model, method)
    train_a_little(live)
    save_adapter(live, tmp_path)
    assert_same_output(reloaded_velocity(tiny_model, tmp_path, rows), velocity_of(live, rows))


def test_a_pipeline_of_dev_with_the_adapter_gives_the_live_models_output(tiny_model, tiny_dev_model, tmp_path, rows):
    """diffusers expands dev's input layer itself when the adapter's is wider."""
    live = adapted(tiny_dev_model, lora(alpha=12), expanded=True)
    train_a_little(live)
    save_adapter(live, tmp_path)
    dev = FluxTransformer2DModel.from_pretrained(tiny_dev_model, subfolder="transformer")
    assert dev.config.in_channels == 64
    fresh = FluxFillPipeline.from_pretrained(tiny_model, transformer=dev, **NO_TEXT)
    fresh.load_lora_weights(tmp_path)
    assert fresh.transformer.config.in_channels == 384
    assert_same_output(velocity_of(fresh.transformer, rows), velocity_of(live, rows))


def test_the_file_means_the_same_to_tools_that_read_no_alpha(tiny_model, tmp_path):
    """ComfyUI looks for alpha tensors alone, diffusers for metadata; without either the scale is 1."""
    live = adapted(tiny_model, lora(rank=4, alpha=12))
    train_a_little(live)
    save_adapter(live, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_NAME]
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        names = list(file.keys())
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 4)
    saved, own = load_file(tmp_path / WEIGHTS_NAME), adapter_of(live)
    for name, tensor in own.items():
        torch.testing.assert_close(saved[f"transformer.{name}"], tensor * (3 if ".lora_B." in name else 1))
    assert all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", name) for name in names)


def test_given_tensors_are_written_in_the_place_of_the_live_ones(tiny_model, tmp_path):
    live = adapted(tiny_model, lora())
    average = {name: torch.full_like(p, 0.25) for name, p in live.named_parameters() if p.requires_grad}
    save_adapter(live, tmp_path, tensors=average)
    saved = load_file(tmp_path / WEIGHTS_NAME)
    assert saved.keys() == {f"transformer.{name}" for name in adapter_of(live)}
    assert all((tensor == (0.5 if ".lora_B." in name else 0.25)).all() for name, tensor in saved.items())


@pytest.mark.parametrize("rank", [4, 320, 400])
def test_an_expanded_devs_file_names_its_width_whatever_the_rank_and_whatever_became_of_the_weight(
    tiny_dev_model, rank
):
    """The other layers may have the input layer's rank. Sharded by ZeRO-3, or packed in 4 bits, the base's weight has
    another shape."""
    live = adapted(tiny_dev_model, lora(rank=rank), expanded=True)
    assert widens_input(live)
    live.x_embedder.get_base_layer().weight.data = torch.empty(0)
    found = file_tensors(live, adapter_tensors(live))
    assert found["transformer.x_embedder.reshape_weight"].tolist() == [192, 384]


@each_method
def test_a_file_holds_what_single_readers_look_for(tiny_model, method):
    """OneTrainer's `.weight` of magnitudes, LoKr's alpha, which is the rank."""
    live = adapted(tiny_model, method)
    names = file_tensors(live, adapter_tensors(live))
    alphas = {tensor.item() for name, tensor in names.items() if name.endswith(".alpha")}
    assert alphas == ({method.rank} if method.type == "lokr" else set())
    assert any(name.endswith(".lora_magnitude_vector.weight") for name in names) == (method.type == "dora")
    assert not any(name.endswith("reshape_weight") for name in names)
