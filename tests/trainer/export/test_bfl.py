"""Against FLUX.1-Fill's real names and sizes, and against diffusers' own reader of BFL's files."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from trainer.export.bfl import bfl_tensors, read_as_bfl, read_from_bfl
from trainer.model.flux import load_transformer

WIDTH, MLP, HEAD = 3072, 4 * 3072, 128


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def fill_of_bfl() -> dict[str, tuple[int, ...]]:
    """Names and shapes of flux1-fill-dev.safetensors."""
    found = linear("img_in", WIDTH, 384) | linear("txt_in", WIDTH, 4096)
    for name, inputs in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        found |= linear(f"{name}.in_layer", WIDTH, inputs) | linear(f"{name}.out_layer", WIDTH, WIDTH)
    for block in range(19):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            found |= linear(f"{name}_mod.lin", 6 * WIDTH, WIDTH)
            found |= linear(f"{name}_attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{name}_attn.proj", WIDTH, WIDTH)
            found |= linear(f"{name}_mlp.0", MLP, WIDTH) | linear(f"{name}_mlp.2", WIDTH, MLP)
            found |= {f"{name}_attn.norm.{kind}_norm.scale": (HEAD,) for kind in ("query", "key")}
    for block in range(38):
        name = f"single_blocks.{block}"
        found |= linear(f"{name}.modulation.lin", 3 * WIDTH, WIDTH)
        found |= linear(f"{name}.linear1", 3 * WIDTH + MLP, WIDTH) | linear(f"{name}.linear2", WIDTH, WIDTH + MLP)
        found |= {f"{name}.norm.{kind}_norm.scale": (HEAD,) for kind in ("query", "key")}
    return found | linear("final_layer.linear", 64, WIDTH) | linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)


def real_fill(**settings: int) -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True, **settings)


def test_the_real_architecture_has_the_names_and_shapes_of_the_published_file():
    transformer = real_fill()
    parameters = dict(transformer.named_parameters())
    tensors = bfl_tensors(transformer)
    read = read_as_bfl(lambda name: parameters[name], tensors)
    assert (len(parameters), len(tensors)) == (1160, 780)
    assert {name: tuple(read(name).shape) for name in tensors} == fill_of_bfl()
    back = read_from_bfl(read, tensors, {name: p.shape for name, p in parameters.items()})
    assert all(back(name).shape == parameter.shape for name, parameter in parameters.items())


def test_there_and_back_every_bit_is_the_same(tiny_model):
    transformer = load_transformer(tiny_model, dtype=torch.float32)
    parameters = {name: torch.randn_like(parameter) for name, parameter in transformer.named_parameters()}
    tensors = bfl_tensors(transformer)
    as_bfl = {name: read_as_bfl(parameters.__getitem__, tensors)(name) for name in tensors}
    back = read_from_bfl(as_bfl.__getitem__, tensors, {name: p.shape for name, p in parameters.items()})
    assert all(torch.equal(back(name), tensor) for name, tensor in parameters.items())
    assert sum(t.numel() for t in as_bfl.values()) == sum(t.numel() for t in parameters.values())


def test_diffusers_reads_the_same_out_of_it():
    """Its converter cuts rows alone, and at FLUX.1's own width: a column of each matrix tells all."""
    transformer = real_fill(num_layers=2, num_single_layers=2)
    generator = torch.Generator().manual_seed(0)
    columns = {
        name: torch.randn(p.shape[0], *([1] * (p.ndim - 1)), generator=generator)
        for name, p in transformer.named_parameters()
    }
    tensors = bfl_tensors(transformer)
    read = read_as_bfl(columns.__getitem__, tensors)
    converted = convert_flux_transformer_checkpoint_to_diffusers({name: read(name) for name in tensors})
    assert converted.keys() == columns.keys()
    assert [name for name, tensor in columns.items() if not torch.equal(converted[name], tensor)] == []


def test_a_model_with_other_tensors_has_no_names_there():
    transformer = real_fill(num_layers=1, num_single_layers=1)
    transformer.extra = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(RuntimeError, match="not those of FLUX"):
        bfl_tensors(transformer)
