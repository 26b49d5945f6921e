"""Exports of whole models, read by other code than what wrote them, and what cannot be had."""

import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors.torch import load_file

from configs.errors import InputError
from tests.trainer.adapters.live_models import METHODS, NO_TEXT, assert_same_output, lora, velocity_of
from tests.trainer.export.made_checkpoints import WHOLE, make_checkpoint
from trainer.export import formats
from trainer.export.bfl import bfl_tensors, read_from_bfl
from trainer.export.formats import _OF_MODELS, FORMATS, choose_dtype, write_format
from trainer.export.from_checkpoint import export_checkpoint
from trainer.export.trained import open_trained
from trainer.model.flux import load_transformer

FP8 = torch.float8_e4m3fn
MERGED = {"lora": lora(alpha=12), "dora": METHODS["dora"], "lokr": METHODS["lokr-low-rank"]}


def loaded(tiny_model, tensors):
    """The tiny Fill with other tensors."""
    transformer = load_transformer(tiny_model, dtype=torch.float32)
    transformer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return transformer


def from_bfl(tiny_model, file):
    plain = load_transformer(tiny_model, dtype=torch.float32)
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    read = read_from_bfl(load_file(file).__getitem__, bfl_tensors(plain), shapes)
    return loaded(tiny_model, {name: read(name) for name in shapes})


@pytest.mark.parametrize("method", MERGED.values(), ids=MERGED)
def test_an_adapter_merged_into_its_base_is_a_pipeline_of_its_own(tiny_model, tmp_path, rows, method):
    _, live = make_checkpoint(tiny_model, method, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out", form="merged", dtype="fp32")
    fresh = FluxFillPipeline.from_pretrained(tmp_path / "out", **NO_TEXT)
    assert_same_output(velocity_of(fresh.transformer, rows), velocity_of(live, rows))


def test_a_lora_of_dev_merged_is_a_fill(tiny_dev_model, tmp_path, rows):
    _, live = make_checkpoint(tiny_dev_model, lora(), tmp_path / "run", expanded=True)
    export_checkpoint(tmp_path / "run", tmp_path / "out", form="merged", dtype="fp32")
    fresh = FluxFillPipeline.from_pretrained(tmp_path / "out", **NO_TEXT)
    assert fresh.transformer.config.in_channels == 384
    assert_same_output(velocity_of(fresh.transformer, rows), velocity_of(live, rows))


@pytest.mark.parametrize("form", ["diffusers", "onefile", "bfl"])
def test_a_full_fine_tune_of_dev_in_every_form(tiny_model, tiny_dev_model, tmp_path, rows, form):
    """Whose published transformer config has no out_channels."""
    _, live = make_checkpoint(tiny_dev_model, WHOLE, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out", form=form, dtype="fp32")
    if form == "diffusers":
        found = FluxFillPipeline.from_pretrained(tmp_path / "out", **NO_TEXT).transformer
        assert (found.config.in_channels, found.config.out_channels) == (384, 64)
    elif form == "onefile":
        found = loaded(tiny_model, load_file(tmp_path / "out" / "run.safetensors"))
    else:
        found = from_bfl(tiny_model, tmp_path / "out" / "run.safetensors")
    assert_same_output(velocity_of(found, rows), velocity_of(live, rows))


def test_both_kinds_of_single_file_hold_the_merged_model_in_bf16(tiny_model, tmp_path):
    make_checkpoint(tiny_model, lora(), tmp_path / "run")
    for form in ("bfl", "onefile"):
        export_checkpoint(tmp_path / "run", tmp_path / form, form=form)
    held = {form: load_file(tmp_path / form / "run.safetensors") for form in ("bfl", "onefile")}
    assert all(tensor.dtype == torch.bfloat16 for tensors in held.values() for tensor in tensors.values())
    assert len(held["bfl"]) < len(held["onefile"])
    assert sum(t.numel() for t in held["bfl"].values()) == sum(t.numel() for t in held["onefile"].values())


def test_fp8_is_of_the_blocks_alone_and_diffusers_reads_it(tiny_model, tmp_path, rows):
    _, live = make_checkpoint(tiny_model, WHOLE, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "folder", dtype="fp8")
    export_checkpoint(tmp_path / "run", tmp_path / "file", form="bfl", dtype="fp8")
    held = load_file(tmp_path / "file" / "run.safetensors")
    assert {name for name, t in held.items() if t.dtype == FP8} == {
        name for name, t in held.items() if "_blocks." in name and t.ndim == 2
    }
    small, whole = (tmp_path / "file" / "run.safetensors"), sum(p.nbytes for p in live.parameters())
    assert small.stat().st_size < 0.35 * whole
    expected = velocity_of(live, rows)
    fresh = FluxFillPipeline.from_pretrained(tmp_path / "folder", torch_dtype=torch.float32, **NO_TEXT)
    for found in (fresh.transformer, from_bfl(tiny_model, tmp_path / "file" / "run.safetensors")):
        assert found.dtype == torch.float32
        assert 0 < (velocity_of(found, rows) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    "method, form, dtype, words",
    [
        (WHOLE, "merged", None, "merged: is whole already"),
        (WHOLE, "kohya", None, r"kohya: is for adapters.*Give diffusers, comfyui, bfl, onefile"),
        (WHOLE, "peft", "bf16", "peft: is for adapters"),
        (METHODS["dora"], "kohya", None, r"sd-scripts has no DoRA.*merged"),
        (lora(), "comfyui", "fp8", "fp8 is for whole models"),
    ],
)
def test_what_a_run_cannot_have_is_told(tiny_model, tmp_path, method, form, dtype, words):
    trained = open_trained(make_checkpoint(tiny_model, method, tmp_path / "run")[0], "live")
    with pytest.raises(InputError, match=words):
        choose_dtype(trained, form, dtype)


@pytest.mark.parametrize(
    "method, form, dtype",
    [
        (lora(), "diffusers", "fp32"),
        (lora(), "merged", "bf16"),
        (lora(), "bfl", "bf16"),
        (METHODS["dora"], "diffusers", "fp32"),
        (METHODS["dora"], "comfyui", "bf16"),  # as large as the layers
        (METHODS["lokr-low-rank"], "kohya", "fp32"),
        (WHOLE, "comfyui", "bf16"),
    ],
)
def test_the_usual_dtype(tiny_model, tmp_path, method, form, dtype):
    trained = open_trained(make_checkpoint(tiny_model, method, tmp_path / "run")[0], "live")
    assert choose_dtype(trained, form, None) == dtype


def test_a_layer_that_is_lost_on_the_way_is_an_error(tiny_model, tmp_path, monkeypatch):
    trained = open_trained(make_checkpoint(tiny_model, lora(), tmp_path / "run")[0], "live")
    write = formats.write_tensor_dict

    def write_less(file, tensors, metadata):
        write(file, {name: tensor for name, tensor in tensors.items() if "double_blocks_1" not in name}, metadata)

    monkeypatch.setattr(formats, "write_tensor_dict", write_less)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RuntimeError, match="came back with other layers"):
        write_format(trained, out, "kohya", torch.float32, {})


EVERY = [(kind, form) for kind in ("lora", "full") for form in (FORMATS if kind == "lora" else _OF_MODELS)]


@pytest.mark.parametrize("kind, form", EVERY, ids=[f"{kind}-{form}" for kind, form in EVERY])
def test_one_tensor_that_is_written_otherwise_is_found_in_every_format(tiny_model, tmp_path, monkeypatch, kind, form):
    """No option leaves the look at what was written out."""
    from data.storage import safetensors_file

    make_checkpoint(tiny_model, lora() if kind == "lora" else WHOLE, tmp_path / "run")
    write = safetensors_file.write_tensors

    def write_otherwise(path, specs, read, *rest, **more):
        changed = next(name for name, spec in specs.items() if spec.dtype.is_floating_point and "norm" not in name)
        write(path, specs, lambda name: read(name) + (name == changed), *rest, **more)

    for module in (safetensors_file, formats):
        monkeypatch.setattr(module, "write_tensors", write_otherwise)
    with pytest.raises(RuntimeError, match=r"came back different|another velocity"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", form=form)
    assert not list(tmp_path.glob("out*"))
