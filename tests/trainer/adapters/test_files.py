"""An adapter is right if a stranger's FluxFillPipeline, given the folder, paints what the trainer's model painted."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from tests.trainer.adapters.live_models import (
    DORA,
    LOKR,
    METHODS,
    NO_TEXT,
    RANK,
    adapted,
    adapter_of,
    assert_same_output,
    lora,
    reloaded_velocity,
    train_a_little,
    velocity_of,
)
from trainer.adapters.dora import DoraMagnitude
from trainer.adapters.files import WEIGHTS_NAME, save_adapter
from trainer.adapters.lokr import Kronecker
from trainer.export.verify import verify_adapter

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


# --- starting from an existing one ------------------------------------------------------------------------------------


@pytest.fixture
def existing(tiny_model, tmp_path) -> Path:
    """A trained adapter of rank 4, alpha 8, on attention and MLP."""
    live = adapted(tiny_model, lora())
    train_a_little(live)
    save_adapter(live, tmp_path / "existing")
    return tmp_path / "existing"


@pytest.mark.parametrize("given", ["folder", "file", "renamed"])
def test_init_from_takes_a_lora_over(tiny_model, existing, rows, given):
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
def test_init_from_takes_an_adapter_over(tiny_model, tmp_path, rows, method):
    first = adapted(tiny_model, method)
    train_a_little(first)
    save_adapter(first, tmp_path)
    second = adapted(tiny_model, method.model_copy(update={"init_from": tmp_path}))
    assert any(isinstance(module, DoraMagnitude | Kronecker) for module in second.modules())
    assert_same_output(velocity_of(second, rows), velocity_of(first, rows))
    verify_adapter(second, tiny_model, tmp_path)
    assert [p.requires_grad for p in second.parameters()] == [p.requires_grad for p in first.parameters()]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 8, "alpha": 16}, "its rank is 4: set method.rank"),
        ({"targets": "attention"}, "adapts .*, which this run does not: see method.targets"),
        ({"targets": ["to_q", "to_k", "norm1.linear"]}, "lacks transformer_blocks.0.norm1.linear"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_what_to_set(tiny_model, existing, settings, words):
    with pytest.raises(InputError, match=words) as refused:
        adapted(tiny_model, lora(init_from=existing, **settings))
    assert str(existing) in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 4


def test_every_misfit_is_told_at_once(tiny_model, existing):
    with pytest.raises(InputError) as refused:
        adapted(tiny_model, lora(init_from=existing, rank=2, alpha=3, targets=["to_q", "norm.linear"]))
    message = str(refused.value)
    assert all(words in message for words in ("lacks", "adapts", "its rank is 4"))


def test_an_adapter_on_fill_does_not_fit_an_expanded_dev(tiny_dev_model, existing):
    with pytest.raises(InputError, match="lacks x_embedder, which this run adapts"):
        adapted(tiny_dev_model, lora(init_from=existing), expanded=True)


@pytest.mark.parametrize(
    "of, to, words",
    [
        (DORA, lora(), r"it is a DoRA: set method\.type=dora"),
        (lora(), DORA, r"it is a plain LoRA: set method\.type=lora"),
        (DORA, LOKR, r"holds transformer\..*lora_.*, but a LoKr .*lokr_w1"),
        (LOKR, DORA, "lacks"),
        (LOKR, LOKR.model_copy(update={"rank": 3}), r"lokr_w2_. is \(.*set method\.rank and method\.factor"),
        (LOKR, LOKR.model_copy(update={"factor": 8}), r"lokr_w.* is \(.*set method\.rank and method\.factor"),
        (LOKR, LOKR.model_copy(update={"targets": "attention"}), r"adapts 44 layers, this run 28: see method\.targets"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_with_what_to_set(tiny_model, tmp_path, of, to, words):
    save_adapter(adapted(tiny_model, of), tmp_path)
    with pytest.raises(InputError, match=words):
        adapted(tiny_model, to.model_copy(update={"init_from": tmp_path}))


def changed(source: Path, target: Path, change) -> Path:
    """A copy of an adapter file without metadata, its tensors changed."""
    tensors = load_file(source / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, target)
    return target


def test_without_metadata_alpha_is_the_rank_as_diffusers_reads_it(tiny_model, existing, tmp_path, rows):
    plain = changed(existing, tmp_path / "plain.safetensors", lambda tensors: None)
    for alpha in (RANK, 3 * RANK):  # the config's own alpha changes how it goes on, not where
        live = adapted(tiny_model, lora(init_from=plain, alpha=alpha))
        expected = reloaded_velocity(tiny_model, plain, rows)
        assert_same_output(velocity_of(live, rows), expected)


def test_alpha_tensors_are_heeded(tiny_model, existing, tmp_path, rows):
    def add_alphas(tensors):
        layers = {name.partition(".lora_")[0] for name in tensors}
        tensors.update({f"{layer}.alpha": torch.tensor(12.0) for layer in layers})

    file = changed(existing, tmp_path / "alphas.safetensors", add_alphas)
    for alpha in (12, RANK):
        live = adapted(tiny_model, lora(init_from=file, alpha=alpha))
        expected = reloaded_velocity(tiny_model, file, rows)
        assert_same_output(velocity_of(live, rows), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.update({"text_encoder.x.lora_A.weight": torch.zeros(4, 8)}), "text encoders"),
        (lambda t: t.update({"transformer.x_embedder.lora_A.weight": torch.zeros(4, 384)}), "adapts x_embedder"),
        (
            lambda t: t.update({"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.zeros(192)}),
            "it is a DoRA: set method.type",
        ),
        (
            lambda t: t.update({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 3072)}),
            "made for another model",
        ),
        (lambda t: t.update({"lora_unet_x.dora_scale": torch.zeros(8, 1)}), "DoRA in kohya's format"),
        (lambda t: t.clear(), "lacks"),
    ],
)
def test_a_file_with_other_tensors_is_refused(tiny_model, existing, tmp_path, change, words):
    file = changed(existing, tmp_path / "other.safetensors", change)
    with pytest.raises(InputError, match=words):
        adapted(tiny_model, lora(init_from=file, alpha=RANK))


def test_a_source_that_is_no_adapter_is_refused(tiny_model, tmp_path):
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, two / name)
    (tmp_path / "pickle.bin").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 100)
    for source, words in {
        tmp_path / "missing": "no such file or folder",
        tmp_path / "pickle.bin": "no .safetensors file",
        two: "holds 2 .safetensors files",
        tmp_path / "broken.safetensors": "not a FLUX.1 LoRA that diffusers reads",
    }.items():
        with pytest.raises(InputError, match=words):
            adapted(tiny_model, lora(init_from=source))


def test_a_kohya_file_can_be_gone_on_from(tiny_model, tmp_path, rows):
    """sd-scripts' names and layout: q, k and v share one pair of factors; alpha is a tensor, folded in on reading."""
    generator, width = torch.Generator().manual_seed(2), 192
    shapes = {"attn_qkv": (3 * width, width), "attn_proj": (width, width), "mlp_0": (4 * width, width)}
    tensors = {}
    # Of the double blocks alone: diffusers' converter knows the single blocks' fused layers in FLUX.1's own width only.
    for block in range(2):
        for stream in ("img", "txt"):
            for part, (to, of) in shapes.items():
                name = f"lora_unet_double_blocks_{block}_{stream}_{part}"
                tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, of, generator=generator)
                tensors[f"{name}.lora_up.weight"] = torch.randn(to, RANK, generator=generator)
                tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "kohya.safetensors")

    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    names = [*(f"attn.{name}" for name in attention), "ff.net.0.proj", "ff_context.net.0.proj"]
    targets = [f"transformer_blocks.{block}.{name}" for block in range(2) for name in names]
    live = adapted(tiny_model, lora(alpha=RANK, targets=targets, init_from=tmp_path / "kohya.safetensors"))
    expected = reloaded_velocity(tiny_model, tmp_path / "kohya.safetensors", rows)
    assert_same_output(velocity_of(live, rows), expected)
