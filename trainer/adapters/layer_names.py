"""FLUX.1's linear layers by the names that adapter files give them.

diffusers and peft say `transformer_blocks.0.attn.to_q`.  BFL's code, and with it ComfyUI, say
`double_blocks.0.img_attn.qkv`, where q, k and v are the rows of one layer.  sd-scripts and LyCORIS write either with
underscores for dots.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from diffusers import FluxTransformer2DModel

# diffusers' name -> BFL's, within a block of each kind and outside the blocks. Layers of one BFL name are its rows, in
# this order.
_DOUBLE_BLOCK = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE_BLOCK = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
}
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SCALE_BEFORE_SHIFT = "norm_out.linear"  # where BFL's has the shift's rows first

_PREFIXES = re.compile(
    r"(base_model\.model\.)?(transformer\.|(model\.)?diffusion_model\.|lora_unet_|lora_transformer_|lycoris_)?"
)
_TEXT_ENCODER = re.compile(r"lora_te|text_encoder|clip_l|t5xxl")


class LayerPart(NamedTuple):
    """A layer in diffusers' naming, and where its outputs lie among those of a file's layer.

    swapped: the halves of the rows are the other way round.
    """

    layer: str
    rows: slice
    swapped: bool = False


def parts_by_name(transformer: FluxTransformer2DModel) -> dict[str, list[LayerPart]]:
    """`flat_name` of a file's layer -> the model's layers that it is: one, or several whose rows it joins."""
    found: dict[str, list[LayerPart]] = {}
    for layer, bfl_name in bfl_layers(transformer):
        out_features = transformer.get_submodule(layer).out_features
        assert isinstance(out_features, int)
        found[flat_name(layer)] = [LayerPart(layer, slice(0, out_features))]
        parts = found.setdefault(flat_name(bfl_name), [])
        start = parts[-1].rows.stop if parts else 0
        parts.append(LayerPart(layer, slice(start, start + out_features), layer == SCALE_BEFORE_SHIFT))
    return found


def bfl_layers(transformer: FluxTransformer2DModel) -> Iterator[tuple[str, str]]:
    """Every linear layer of the model, and its name in BFL's code."""
    stacks = {("transformer_blocks", "double_blocks"): _DOUBLE_BLOCK}
    stacks[("single_transformer_blocks", "single_blocks")] = _SINGLE_BLOCK
    for (stack, bfl_stack), names in stacks.items():
        for block in range(len(transformer.get_submodule(stack))):
            for name, bfl_name in names.items():
                yield f"{stack}.{block}.{name}", f"{bfl_stack}.{block}.{bfl_name}"
    yield from _OUTSIDE.items()


def flat_name(name: str) -> str:
    """A layer's name without the prefix of the program that wrote it, and with underscores for dots."""
    return name[_PREFIXES.match(name).end() :].replace(".", "_")  # type: ignore[union-attr]  # it matches ""


def is_of_text_encoder(name: str) -> bool:
    """Whether a tensor or layer of a file belongs to CLIP or T5."""
    return _TEXT_ENCODER.match(name) is not None
