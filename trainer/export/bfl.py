"""FLUX.1's tensors by the names of BFL's own code, which ComfyUI and other single-file readers know, and back.

q, k and v are one tensor there, and the last modulation has its shift before its scale.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from data.storage.safetensors_file import ReadTensor
from trainer.adapters.layer_names import SCALE_BEFORE_SHIFT, bfl_layers

# Norms of a block, diffusers' name -> BFL's.
_NORMS = {
    ("transformer_blocks", "double_blocks"): {
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
    },
    ("single_transformer_blocks", "single_blocks"): {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"},
}


class Rows(NamedTuple):
    """Where a tensor of diffusers' lies in one of BFL's."""

    bfl_name: str
    start: int
    stop: int
    swapped: bool  # the halves are the other way round


def bfl_tensors(transformer: FluxTransformer2DModel) -> dict[str, list[str]]:
    """BFL's tensor -> diffusers' tensors that are its rows, in their order; every tensor of the model once.

    transformer: without an adapter; may be on the meta device.
    """
    found: dict[str, list[str]] = {}
    for layer, bfl_name in bfl_layers(transformer):
        for kind in ("weight", "bias"):
            found.setdefault(f"{bfl_name}.{kind}", []).append(f"{layer}.{kind}")
    for norm, bfl_name in _norms(transformer):
        found[f"{bfl_name}.scale"] = [f"{norm}.weight"]
    parts = [part for parts in found.values() for part in parts]
    if sorted(parts) != sorted(name for name, _ in transformer.named_parameters()):
        raise RuntimeError("this model's tensors are not those of FLUX.1: BFL's code has no names for them")
    return found


def _norms(transformer: FluxTransformer2DModel) -> Iterator[tuple[str, str]]:
    for (stack, bfl_stack), names in _NORMS.items():
        for block in range(len(transformer.get_submodule(stack))):
            for name, bfl_name in names.items():
                yield f"{stack}.{block}.{name}", f"{bfl_stack}.{block}.{bfl_name}"


def read_as_bfl(read: ReadTensor, tensors: Mapping[str, list[str]]) -> ReadTensor:
    """Reader of BFL's tensors from one of diffusers'.  tensors: of `bfl_tensors`."""

    def read_bfl(name: str) -> Tensor:
        parts = tensors[name]
        if len(parts) == 1:
            return _swap_halves(read(parts[0])) if _is_swapped(parts[0]) else read(parts[0])
        return torch.cat([read(part) for part in parts])

    return read_bfl


def read_from_bfl(read: ReadTensor, tensors: Mapping[str, list[str]], shapes: Mapping[str, torch.Size]) -> ReadTensor:
    """Reader of diffusers' tensors from one of BFL's.  shapes: of diffusers' tensors."""
    places: dict[str, Rows] = {}
    for name, parts in tensors.items():
        stop = 0
        for part in parts:
            start, stop = stop, stop + shapes[part][0]
            places[part] = Rows(name, start, stop, _is_swapped(part))

    def read_part(name: str) -> Tensor:
        place = places[name]
        rows = read(place.bfl_name)[place.start : place.stop]
        return _swap_halves(rows) if place.swapped else rows

    return read_part


def _is_swapped(name: str) -> bool:
    return name.startswith(f"{SCALE_BEFORE_SHIFT}.")


def _swap_halves(rows: Tensor) -> Tensor:
    return rows.roll(rows.shape[0] // 2, dims=0)
