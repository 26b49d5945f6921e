import json
import os
import shutil
import weakref

import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from configs.schema import LoraConfig
from tests.trainer.export.trained_models import change_one_number, trained_model
from trainer.adapters.build import add_adapter
from trainer.adapters.files import WEIGHTS_NAME, save_adapter
from trainer.export.verify import verify_model
from trainer.export.write import export_model
from trainer.model.flux import load_transformer

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def weights_of(transformer) -> dict[str, torch.Tensor]:
    return dict(transformer.named_parameters())


def test_an_exported_model_is_a_pipeline_with_the_trained_weights(tiny_model, exported):
    pipeline = FluxFillPipeline.from_pretrained(exported)
    expected = weights_of(trained_model(tiny_model))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.transformer.named_parameters())
    assert (pipeline.transformer.config.in_channels, pipeline.transformer.config.out_channels) == (384, 64)


def test_where_the_base_lay_is_not_told(tiny_model, exported):
    told = (exported / "transformer" / "config.json").read_text()
    assert str(tiny_model.parent) not in told and "_name_or_path" not in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_model_is_written_in_several_files(tiny_model, tmp_path, dtype):
    transformer = trained_model(tiny_model)
    folder, limit = tmp_path / "final", 3_000_000
    export_model(transformer, tiny_model, folder, weights=transformer.named_parameters(), dtype=dtype, file_bytes=limit)
    files = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < limit + 50_000 for file in files)
    reloaded = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)
    assert all(torch.equal(reloaded.get_parameter(n), p.to(dtype)) for n, p in transformer.named_parameters())
    verify_model(transformer, folder, weights=transformer.named_parameters(), dtype=dtype)
    change_one_number(files[1], 0.123)
    with pytest.raises(RuntimeError, match="1 tensors came back different"):
        verify_model(transformer, folder, weights=transformer.named_parameters(), dtype=dtype)


def test_an_export_holds_one_file_of_weights_at_a_time(tiny_model, tmp_path):
    transformer = trained_model(tiny_model)
    limit, held = 3_000_000, []

    def one_by_one():
        alive: list[weakref.ref] = []
        for name, parameter in transformer.named_parameters():
            array = parameter.detach().numpy().copy()  # lives as long as a tensor made of it is held
            alive = [*(known for known in alive if known() is not None), weakref.ref(array)]
            held.append(sum(known().nbytes for known in alive))
            yield name, torch.from_numpy(array)

    export_model(
        transformer, tiny_model, tmp_path / "final", weights=one_by_one(), dtype=torch.float32, file_bytes=limit
    )
    largest = max(parameter.nbytes for parameter in transformer.parameters())
    assert limit / 2 < max(held) <= limit + largest < sum(p.nbytes for p in transformer.parameters()) / 4


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda weights: weights[:-1], r"1 tensors were not given.*proj_out\.bias"),
        (lambda weights: [*weights, weights[0]], "was given twice"),
        (lambda weights: [*weights, ("stranger", torch.zeros(2))], r"stranger \[2\] does not belong"),
        (lambda weights: [(weights[0][0], torch.zeros(3)), *weights[1:]], r"\[3\] does not belong"),
    ],
)
def test_weights_of_another_model_are_refused_and_nothing_is_left(tiny_model, tmp_path, change, words):
    transformer = trained_model(tiny_model)
    weights = change(list(transformer.named_parameters()))
    with pytest.raises(RuntimeError, match=words):
        export_model(transformer, tiny_model, tmp_path / "final", weights=weights, dtype=torch.float32)
    assert not list(tmp_path.glob("final*"))


def test_the_other_parts_are_the_bases_files(tiny_model, exported):
    for part in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        files = [path.relative_to(tiny_model) for path in (tiny_model / part).rglob("*") if path.is_file()]
        assert files
        assert all((exported / file).read_bytes() == (tiny_model / file).read_bytes() for file in files)
    assert {path.name for path in exported.iterdir()} == {path.name for path in tiny_model.iterdir()}


def test_others_may_read_an_export_as_they_may_any_file(tiny_model, exported, tmp_path):
    """safetensors makes files that only their owner may read."""
    (tmp_path / "usual").touch()
    transformer = load_transformer(tiny_model, dtype=torch.float32)
    add_adapter(transformer, LoraConfig(type="lora", rank=2), expanded=False, seed=0)
    save_adapter(transformer, tmp_path / "adapter")
    for path in (exported / WEIGHTS, tmp_path / "adapter" / WEIGHTS_NAME):
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_large_parts_are_hard_links_and_symbolic_ones_are_followed(tiny_model, tmp_path):
    """A hub cache is made of symbolic links into its blobs: a link to a link would break with the cache."""
    hub = tmp_path / "hub"
    shutil.copytree(tiny_model, hub, copy_function=lambda source, target: os.symlink(source, target))
    transformer = load_transformer(hub, dtype=torch.float32)
    export_model(transformer, hub, tmp_path / "final", weights=transformer.named_parameters(), dtype=torch.float32)
    file = tmp_path / "final" / "vae" / "diffusion_pytorch_model.safetensors"
    assert not file.is_symlink()
    original = tiny_model / "vae" / file.name
    if original.stat().st_dev == file.stat().st_dev:
        assert file.samefile(original)
    assert not any(path.is_symlink() for path in (tmp_path / "final").rglob("*"))


def test_a_model_is_copied_where_no_hard_link_can_be_made(tiny_model, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    transformer = load_transformer(tiny_model, dtype=torch.float32)
    export_model(
        transformer, tiny_model, tmp_path / "final", weights=transformer.named_parameters(), dtype=torch.float32
    )
    assert (tmp_path / "final/vae/config.json").read_bytes() == (tiny_model / "vae/config.json").read_bytes()


def test_the_weights_given_are_written_not_the_live_ones(tiny_model, tmp_path):
    """An average, gathered weights of a sharded model: the model at hand does not hold them."""
    transformer = load_transformer(tiny_model, dtype=torch.float32)
    average = {name: torch.full_like(parameter, 0.5) for name, parameter in transformer.named_parameters()}
    export_model(transformer, tiny_model, tmp_path / "final", weights=average.items(), dtype=torch.float32)
    assert all((tensor == 0.5).all() for tensor in load_file(tmp_path / "final" / WEIGHTS).values())
    verify_model(transformer, tmp_path / "final", weights=average.items(), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="came back different"):
        verify_model(transformer, tmp_path / "final", weights=transformer.named_parameters(), dtype=torch.float32)


def test_bf16_export_is_rounded_once_and_verified_in_bf16(tiny_model, tmp_path):
    transformer = trained_model(tiny_model)
    export_model(
        transformer, tiny_model, tmp_path / "final", weights=transformer.named_parameters(), dtype=torch.bfloat16
    )
    stored = load_file(tmp_path / "final" / WEIGHTS)
    assert all(torch.equal(stored[n], p.bfloat16()) for n, p in transformer.named_parameters())
    assert all(parameter.dtype == torch.float32 for parameter in transformer.parameters())  # the live ones stay
    verify_model(transformer, tmp_path / "final", weights=transformer.named_parameters(), dtype=torch.bfloat16)


def test_dev_is_exported_as_a_fill_pipeline(tiny_dev_model, tmp_path):
    transformer = trained_model(tiny_dev_model)
    export_model(
        transformer, tiny_dev_model, tmp_path / "final", weights=transformer.named_parameters(), dtype=torch.float32
    )
    verify_model(transformer, tmp_path / "final", weights=transformer.named_parameters(), dtype=torch.float32)
    index = json.loads((tmp_path / "final" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxFillPipeline"
    assert json.loads((tiny_dev_model / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    pipeline = FluxFillPipeline.from_pretrained(tmp_path / "final")
    assert pipeline.transformer.x_embedder.in_features == pipeline.transformer.config.in_channels == 384
    assert pipeline.transformer.proj_out.out_features == 64


def test_a_second_export_replaces_the_first(tiny_model, exported):
    transformer = load_transformer(tiny_model, dtype=torch.float32)
    (exported / "stray").touch()
    export_model(transformer, tiny_model, exported, weights=transformer.named_parameters(), dtype=torch.float32)
    verify_model(transformer, exported, weights=transformer.named_parameters(), dtype=torch.float32)
    assert not (exported / "stray").exists()
    assert [path.name for path in exported.parent.iterdir()] == ["final"]
