"""A run starts at the output of the adapter it is given, or is refused with what to set."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from tests.trainer.adapters.live_models import (
    DORA,
    LOKR,
    METHODS,
    RANK,
    WHOLE_LOKR,
    adapted,
    adapter_of,
    assert_same_output,
    lora,
    reloaded_velocity,
    train_a_little,
    velocity_of,
)
from tests.trainer.adapters.other_trainers import BLOCKS, OUTSIDE, WIDTH, random_lora, write_lora
from trainer.adapters.dora import DoraMagnitude
from trainer.adapters.files import ADAPTER, WEIGHTS_NAME, save_adapter
from trainer.adapters.lokr import Kronecker
from trainer.export.verify import verify_adapter
from trainer.model.flux import load_transformer

each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture
def existing(tiny_model, tmp_path) -> Path:
    """A trained LoRA of rank 4 on attention and MLP."""
    live = adapted(tiny_model, lora())
    train_a_little(live)
    save_adapter(live, tmp_path / "existing")
    return tmp_path / "existing"


@pytest.fixture
def notes(caplog):
    """What the log says, as one text."""
    caplog.set_level(logging.INFO, logger="fluxfill")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def changed(source: Path, target: Path, change) -> Path:
    """A copy of an adapter file without metadata, its tensors changed."""
    tensors = load_file(source / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, target)
    return target


@pytest.mark.parametrize("given", ["folder", "file", "renamed"])
def test_a_lora_is_taken_over(tiny_model, existing, rows, given):
    if given == "renamed":
        (existing / WEIGHTS_NAME).rename(existing / "mine.safetensors")
    source = existing / WEIGHTS_NAME if given == "file" else existing
    live = adapted(tiny_model, lora(init_from=source))
    file = next(existing.iterdir())
    saved = load_file(file)
    for name, tensor in adapter_of(live).items():
        assert torch.equal(tensor * (2 if ".lora_B." in name else 1), saved[f"transformer.{name}"])
    assert [p.dtype for p in live.parameters() if p.requires_grad] == [torch.float32] * len(saved)
    assert_same_output(reloaded_velocity(tiny_model, file, rows), velocity_of(live, rows))


@each_method
def test_an_adapter_is_taken_over(tiny_model, tmp_path, rows, method):
    first = adapted(tiny_model, method)
    train_a_little(first)
    save_adapter(first, tmp_path)
    second = adapted(tiny_model, method.model_copy(update={"init_from": tmp_path}))
    assert any(isinstance(module, DoraMagnitude | Kronecker) for module in second.modules())
    assert_same_output(velocity_of(second, rows), velocity_of(first, rows))
    verify_adapter(second, tiny_model, tmp_path)
    assert [p.requires_grad for p in second.parameters()] == [p.requires_grad for p in first.parameters()]


@pytest.mark.parametrize("alpha, words", [(4, "4 / 4 = 1 in the file, as in this run"), (12, "3 times as far")])
def test_the_scale_is_told_and_moves_no_output(tiny_model, existing, rows, notes, alpha, words):
    live = adapted(tiny_model, lora(init_from=existing, alpha=alpha))
    assert_same_output(velocity_of(live, rows), reloaded_velocity(tiny_model, existing, rows))
    assert words in notes()


def test_a_file_without_alpha_is_told_of(tiny_model, existing, tmp_path, notes):
    plain = changed(existing, tmp_path / "plain.safetensors", lambda tensors: None)
    adapted(tiny_model, lora(init_from=plain, alpha=RANK))
    assert "names no alpha, so alpha / rank is 1 in it, as in this run" in notes()


@pytest.mark.parametrize("method", [lora(rank=6, alpha=6), DORA.model_copy(update={"rank": 6})], ids=["lora", "dora"])
def test_a_smaller_rank_goes_on_at_a_larger_one(tiny_model, tmp_path, rows, notes, method):
    first = adapted(tiny_model, method.model_copy(update={"rank": 4}))
    train_a_little(first)
    save_adapter(first, tmp_path)
    live = adapted(tiny_model, method.model_copy(update={"init_from": tmp_path}))
    assert_same_output(velocity_of(live, rows), velocity_of(first, rows))
    assert "rank 4 goes on at method.rank=6; the further directions start at zero" in notes()
    layer = live.transformer_blocks[0].attn.to_q
    assert layer.lora_A[ADAPTER].weight[4:].abs().min() > 0, "both factors at zero would never learn"
    assert layer.lora_B[ADAPTER].weight[:, 4:].abs().max() == 0


@pytest.mark.parametrize("method", [lora(targets="attention"), DORA.model_copy(update={"targets": "attention"}), LOKR])
def test_layers_that_the_file_lacks_start_at_zero(tiny_model, tmp_path, rows, notes, method):
    first = adapted(tiny_model, method.model_copy(update={"targets": ["to_q"]}))
    train_a_little(first)
    save_adapter(first, tmp_path)
    live = adapted(tiny_model, method.model_copy(update={"init_from": tmp_path}))
    assert_same_output(velocity_of(live, rows), velocity_of(first, rows))
    assert "not in it, so these start at zero: " in notes()
    train_a_little(live)
    assert (velocity_of(live, rows) - velocity_of(first, rows)).abs().max() > 1e-2


def test_a_lora_of_dev_goes_on_with_fills_inputs(tiny_model, tmp_path, rows, notes):
    """As diffusers loads it: zeros for the inputs that FLUX.1-dev has not."""
    made = random_lora({"img_in": (WIDTH, 64), **{layer: BLOCKS[layer] for layer in ("single_blocks.0.linear2",)}})
    file = write_lora(made, tmp_path / "dev.safetensors", prefix="diffusion_model.")
    live = adapted(tiny_model, lora(init_from=file, targets=["x_embedder", "proj_out"]))
    names = {"img_in": "x_embedder", "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out"}
    theirs = {f"transformer.{names[layer]}": factors for layer, factors in made.items()}
    diffusers = write_lora(theirs, tmp_path / "a.safetensors", prefix="", factors=("lora_A", "lora_B"))
    assert_same_output(velocity_of(live, rows), reloaded_velocity(tiny_model, diffusers, rows))
    assert "made for FLUX.1-dev's 64 inputs" in notes()


@pytest.mark.parametrize("inputs", [None, 64])
def test_an_expanded_dev_starts_from_what_there_is_of_its_inputs(tiny_dev_model, tmp_path, rows, inputs):
    layers = {"double_blocks.0.img_mlp.0": BLOCKS["double_blocks.0.img_mlp.0"]}
    layers |= {"img_in": (WIDTH, inputs)} if inputs else {}
    file = write_lora(random_lora(layers), tmp_path / "dev.safetensors", prefix="lora_unet_", flat=True)
    live = adapted(tiny_dev_model, lora(init_from=file), expanded=True)
    base = load_transformer(tiny_dev_model, dtype=torch.float32)
    with torch.no_grad():
        for layer, (down, up, alpha) in random_lora(layers).items():
            module = base.x_embedder if layer == "img_in" else base.transformer_blocks[0].ff.net[0].proj
            module.weight[:, : down.shape[1]] += alpha / 4 * up @ down
    assert_same_output(velocity_of(live, rows), velocity_of(base, rows))


def test_the_models_last_layer_goes_on_and_comes_back(tiny_model, tmp_path, rows):
    """Its name is the end of other layers' names: to peft's targets they would be meant too."""
    last = random_lora({"final_layer.linear": OUTSIDE["final_layer.linear"]})
    file = write_lora(last, tmp_path / "last.safetensors", prefix="diffusion_model.")
    live = adapted(tiny_model, lora(init_from=file, targets=["transformer.proj_out"]))
    assert [name for name in adapter_of(live) if "lora_A" in name] == ["proj_out.lora_A.weight"]
    save_adapter(live, tmp_path / "saved")
    verify_adapter(live, tiny_model, tmp_path / "saved")
    assert_same_output(reloaded_velocity(tiny_model, tmp_path / "saved", rows), velocity_of(live, rows))


def test_text_encoders_are_left_out_and_it_is_said(tiny_model, existing, tmp_path, notes):
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    file = changed(
        existing,
        tmp_path / "text.safetensors",
        lambda t: t.update({f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(8, 4)}),
    )
    adapted(tiny_model, lora(init_from=file))
    assert "its text encoders' part is left out (layers: 1)" in notes()


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 2}, "its rank is 4: set method.rank=4"),
        (
            {"targets": "attention"},
            r"adapts .*, which this run does not: set method.targets=\[attn.add_k_proj, .*ff.net",
        ),
        ({"targets": ["to_q", "norm_out.linear"]}, r"method.targets=\[.*ff.net.2.*transformer.norm_out.linear\]"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_what_to_set(tiny_model, existing, settings, words):
    with pytest.raises(InputError, match=words) as refused:
        adapted(tiny_model, lora(init_from=existing, **settings))
    assert str(existing) in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 4


def test_an_adapter_of_expanded_dev_on_fill_is_told_as_that(tiny_model, tiny_dev_model, tmp_path, rows):
    """Else the cure would read method.rank=320: its input layer has the rank to learn Fill's inputs."""
    live = adapted(tiny_dev_model, lora(), expanded=True)
    train_a_little(live)
    save_adapter(live, tmp_path)
    with pytest.raises(InputError, match=r"made on FLUX\.1-dev, expanded.*Set model\.base") as refused:
        adapted(tiny_model, lora(init_from=tmp_path))
    assert "method.rank" not in str(refused.value)
    again = adapted(tiny_dev_model, lora(init_from=tmp_path), expanded=True)
    assert_same_output(velocity_of(again, rows), velocity_of(live, rows))


@pytest.mark.parametrize("method", [lora(rank=320), DORA.model_copy(update={"rank": 400})])
@pytest.mark.parametrize("told_by", ["the width", "the settings", "the targets"])
def test_an_adapter_of_expanded_dev_is_known_whatever_the_others_ranks(
    tiny_model, tiny_dev_model, tmp_path, rows, method, told_by
):
    """All layers have the input layer's rank. Older files of that kind tell it by the targets alone."""
    live = adapted(tiny_dev_model, method, expanded=True)
    train_a_little(live)
    save_adapter(live, tmp_path)
    file = tmp_path / WEIGHTS_NAME
    tensors, settings = load_file(file), {}
    if told_by == "the settings":
        with safe_open(file, "pt") as opened:
            settings = opened.metadata()
    elif told_by == "the targets":
        settings = {"fluxfill.method": json.dumps({"type": method.type, "targets": method.targets})}
    if told_by != "the width":
        del tensors["transformer.x_embedder.reshape_weight"]
    save_file(tensors, file, settings)
    again = method.model_copy(update={"init_from": tmp_path})
    with pytest.raises(InputError, match=r"made on FLUX\.1-dev, expanded.*Set model\.base"):
        adapted(tiny_model, again.model_copy(update={"targets": ["attn.to_q", "transformer.x_embedder"]}))
    assert_same_output(velocity_of(adapted(tiny_dev_model, again, expanded=True), rows), velocity_of(live, rows))


@pytest.mark.parametrize(
    "method", [lora(targets=["to_q", "x_embedder"]), DORA.model_copy(update={"targets": ["x_embedder"]})]
)
def test_an_adapter_of_fill_on_expanded_dev_is_told_as_that(tiny_model, tiny_dev_model, tmp_path, method):
    """It adds to weights of the input layer that expanded FLUX.1-dev begins with as zeros."""
    live = adapted(tiny_model, method)
    train_a_little(live)
    save_adapter(live, tmp_path)
    on_dev = method.model_copy(update={"init_from": tmp_path})
    with pytest.raises(InputError, match=r"made on FLUX\.1-Fill: its x_embedder.*Set model\.base to FLUX\.1-Fill-dev"):
        adapted(tiny_dev_model, on_dev, expanded=True)


def test_every_misfit_is_told_at_once(tiny_model, existing, tmp_path):
    file = changed(
        existing,
        tmp_path / "strange.safetensors",
        lambda t: t.update(
            {"diffusion_model.img_in.diff": torch.zeros(4), "lora_unet_input_blocks.alpha": torch.ones(1)}
        ),
    )
    with pytest.raises(InputError) as refused:
        adapted(tiny_model, lora(init_from=file, rank=2, targets=["to_q", "norm.linear"]))
    message = str(refused.value)
    assert all(words in message for words in ("img_in.diff", "input_blocks", "method.targets=[", "its rank is 4"))


def test_the_targets_that_are_named_are_those_it_needs(tiny_model, existing):
    with pytest.raises(InputError) as refused:
        adapted(tiny_model, lora(init_from=existing, targets=["to_q"]))
    targets = re.search(r"method\.targets=\[(.*)\]", str(refused.value))[1].split(", ")
    adapted(tiny_model, lora(init_from=existing, targets=targets))


@pytest.mark.parametrize(
    "of, to, words",
    [
        (DORA, lora(), r"it is a DoRA: set method\.type=dora"),
        (lora(), DORA, r"it is a plain LoRA: set method\.type=lora"),
        (DORA, LOKR, r"it is a DoRA: set method\.type=dora"),
        (LOKR, DORA, r"it is a LoKr: set method\.type=lokr"),
        (LOKR, LOKR.model_copy(update={"rank": 3}), r"lokr_w2_. of \(.*set method\.rank=2 and method\.factor=4"),
        (LOKR, LOKR.model_copy(update={"factor": 8}), r"lokr_w.* of \(.*set method\.rank=2 and method\.factor=4"),
        (WHOLE_LOKR, LOKR, r"lokr_w2 of \(.*set method\.rank=\d+ and method\.factor=auto"),
        (LOKR, LOKR.model_copy(update={"targets": "attention"}), r"set method\.targets=\["),
    ],
)
def test_an_adapter_of_another_kind_is_refused_with_what_to_set(tiny_model, tmp_path, of, to, words):
    save_adapter(adapted(tiny_model, of), tmp_path)
    with pytest.raises(InputError, match=words):
        adapted(tiny_model, to.model_copy(update={"init_from": tmp_path}))


def test_a_dora_in_part_and_sizes_of_another_model_are_refused(tiny_model, tmp_path):
    made = random_lora({layer: BLOCKS[layer] for layer in ("double_blocks.0.img_mlp.0", "double_blocks.1.img_mlp.0")})
    scale = {"diffusion_model.double_blocks.0.img_mlp.0.dora_scale": torch.ones(4 * WIDTH, 1)}
    file = write_lora(made, tmp_path / "part.safetensors", prefix="diffusion_model.", **scale)
    with pytest.raises(InputError, match=r"a plain LoRA on transformer_blocks\.1\.ff.*, a DoRA elsewhere"):
        adapted(tiny_model, DORA.model_copy(update={"init_from": file}))
    file = write_lora(random_lora({"txt_mlp": (4, 4)}), tmp_path / "other.safetensors", prefix="lora_unet_")
    with pytest.raises(InputError, match="txt_mlp, which this model has not"):
        adapted(tiny_model, lora(init_from=file))
    wide = random_lora({"double_blocks.0.img_mlp.0": (4 * WIDTH, 3072)})
    file = write_lora(wide, tmp_path / "wide.safetensors", prefix="lora_unet_")
    with pytest.raises(InputError, match="made for another model"):
        adapted(tiny_model, lora(init_from=file))
