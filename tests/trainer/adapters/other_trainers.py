"""Adapters as other trainers write them, and the model with their weights added: by hand, layer by layer."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from trainer.model.flux import load_transformer

WIDTH = 192  # of the tests' model
OUTSIDE = {  # BFL's layer -> (outputs, inputs)
    "img_in": (WIDTH, 384),
    "txt_in": (WIDTH, 64),
    "time_in.in_layer": (WIDTH, 256),
    "time_in.out_layer": (WIDTH, WIDTH),
    "guidance_in.in_layer": (WIDTH, 256),
    "vector_in.in_layer": (WIDTH, 32),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    "final_layer.linear": (64, WIDTH),
}
DOUBLE = {
    "img_mod.lin": (6 * WIDTH, WIDTH),
    "txt_mod.lin": (6 * WIDTH, WIDTH),
    "img_attn.qkv": (3 * WIDTH, WIDTH),
    "txt_attn.qkv": (3 * WIDTH, WIDTH),
    "img_attn.proj": (WIDTH, WIDTH),
    "txt_attn.proj": (WIDTH, WIDTH),
    "img_mlp.0": (4 * WIDTH, WIDTH),
    "txt_mlp.0": (4 * WIDTH, WIDTH),
    "img_mlp.2": (WIDTH, 4 * WIDTH),
    "txt_mlp.2": (WIDTH, 4 * WIDTH),
}
SINGLE = {
    "linear1": (7 * WIDTH, WIDTH),
    "linear2": (WIDTH, 5 * WIDTH),
    "modulation.lin": (3 * WIDTH, WIDTH),
}
BLOCKS = {f"double_blocks.{i}.{name}": shape for i in range(2) for name, shape in DOUBLE.items()}
BLOCKS |= {f"single_blocks.{i}.{name}": shape for i in range(4) for name, shape in SINGLE.items()}

Layers = Mapping[str, tuple[int, int]]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # layer -> (down, up, alpha)

# The targets of a run that adapts all of BLOCKS, and all of OUTSIDE.
BLOCK_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
BLOCK_TARGETS += ["net.0.proj", "net.2", "proj_mlp", "proj_out", "norm1.linear", "norm1_context.linear", "norm.linear"]
OUTSIDE_TARGETS = ["x_embedder", "context_embedder", "timestep_embedder.linear_1", "timestep_embedder.linear_2"]
OUTSIDE_TARGETS += ["guidance_embedder.linear_1", "text_embedder.linear_1", "norm_out.linear", "transformer.proj_out"]


def random_lora(layers: Layers, *, rank: int = 4, alpha: float = 2.0) -> Factors:
    generator = torch.Generator().manual_seed(7)

    def factors(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        down = torch.randn(rank, inputs, generator=generator) / 4
        return down, torch.randn(outputs, rank, generator=generator) / 4, alpha

    return {layer: factors(*shape) for layer, shape in layers.items()}


def write_lora(
    lora: Factors,
    file: Path,
    *,
    prefix: str,
    factors: tuple[str, str] = ("lora_down", "lora_up"),
    flat: bool = False,
    with_alpha: bool = True,
    **others: torch.Tensor,
) -> Path:
    """flat: underscores for dots, as sd-scripts.  with_alpha: False: alpha is the rank.  others: further tensors."""
    tensors = dict(others)
    for layer, (down, up, alpha) in lora.items():
        name = prefix + (layer.replace(".", "_") if flat else layer)
        tensors[f"{name}.{factors[0]}.weight"] = down
        tensors[f"{name}.{factors[1]}.weight"] = up
        if with_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def rows_of(layer: str) -> list[str]:
    """diffusers' layers that are the rows of one of BFL's, in their order."""
    stack, _, rest = layer.partition(".")
    block, _, name = rest.partition(".")
    if stack == "double_blocks":
        into = {
            "img_mod.lin": ["norm1.linear"],
            "txt_mod.lin": ["norm1_context.linear"],
            "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
            "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            "img_attn.proj": ["attn.to_out.0"],
            "txt_attn.proj": ["attn.to_add_out"],
            "img_mlp.0": ["ff.net.0.proj"],
            "img_mlp.2": ["ff.net.2"],
            "txt_mlp.0": ["ff_context.net.0.proj"],
            "txt_mlp.2": ["ff_context.net.2"],
        }[name]
        return [f"transformer_blocks.{block}.{row}" for row in into]
    if stack == "single_blocks":
        into = {
            "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
            "linear2": ["proj_out"],
            "modulation.lin": ["norm.linear"],
        }[name]
        return [f"single_transformer_blocks.{block}.{row}" for row in into]
    embedder = "time_text_embed.{}_embedder.linear_{}"
    return [
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": embedder.format("timestep", 1),
            "time_in.out_layer": embedder.format("timestep", 2),
            "guidance_in.in_layer": embedder.format("guidance", 1),
            "vector_in.in_layer": embedder.format("text", 1),
            "final_layer.adaLN_modulation.1": "norm_out.linear",
            "final_layer.linear": "proj_out",
        }[layer]
    ]


@torch.no_grad()
def merged(model: Path, changes: Mapping[str, torch.Tensor]) -> FluxTransformer2DModel:
    """The model with a change of weight added to BFL's layers, each [outputs, inputs]."""
    transformer = load_transformer(model, dtype=torch.float32)
    for layer, change in changes.items():
        if layer == "final_layer.adaLN_modulation.1":  # shift, scale here; scale, shift in diffusers
            shift, scale = change.chunk(2)
            change = torch.cat([scale, shift])
        for row in rows_of(layer):
            weight = transformer.get_submodule(row).weight
            weight[:, : change.shape[1]] += change[: weight.shape[0]]
            change = change[weight.shape[0] :]
        assert len(change) == 0
    return transformer


def changes_of(lora: Factors) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each layer's weight."""
    return {layer: alpha / down.shape[0] * up @ down for layer, (down, up, alpha) in lora.items()}
