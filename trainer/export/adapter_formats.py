"""An adapter's tensors by the names that each program looks for.

diffusers' own file (adapters/files.py) is read by most.  Here is what the others need.
"""

from collections.abc import Callable, Mapping

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from data.storage.safetensors_file import ReadTensor, TensorSpec
from trainer.adapters.files import INPUT_LAYER
from trainer.adapters.layer_names import SCALE_BEFORE_SHIFT, bfl_layers
from trainer.adapters.merge import merge
from trainer.adapters.read import Factors

DIFF = ".diff"


def peft_tensors(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For `PeftModel.from_pretrained`, beside an adapter_config.json.  factors: of `adapter_tensors`."""
    return {f"base_model.model.{name}": tensor for name, tensor in factors.items()}


def kohya_tensors(
    transformer: FluxTransformer2DModel, layers: Mapping[str, Factors], *, widens_input: bool
) -> dict[str, Tensor]:
    """A LoRA for sd-scripts, by the names of BFL's layers with underscores; a LoKr for LyCORIS, by diffusers' names.

    transformer: without the adapter; may be on the meta device.  layers: factors of a scale of 1.  Factors of q, k and
    v, which are one layer in BFL's code, stand side by side: nothing is lost, and `read_adapter` takes them apart.
    """
    if any("lokr_w1" in factors for factors in layers.values()):
        return _lycoris_tensors(layers)
    fused: dict[str, list[str]] = {}
    for layer, bfl_name in bfl_layers(transformer):
        fused.setdefault(bfl_name, []).append(layer)
    tensors: dict[str, Tensor] = {}
    for bfl_name, parts in fused.items():
        if not layers.keys() & set(parts):
            continue
        name = f"lora_unet_{bfl_name.replace('.', '_')}"
        a = torch.cat([layers[part]["lora_A"] for part in parts if part in layers])
        tensors[f"{name}.lora_down.weight"] = a
        tensors[f"{name}.lora_up.weight"] = _stack_rows(transformer, parts, layers)
        tensors[f"{name}.alpha"] = torch.tensor(float(a.shape[0]))
        if widens_input and parts == [INPUT_LAYER]:
            tensors[f"{name}.reshape_weight"] = torch.tensor(_shape_of(transformer, INPUT_LAYER))
    return tensors


def _stack_rows(transformer: FluxTransformer2DModel, parts: list[str], layers: Mapping[str, Factors]) -> Tensor:
    """The second factor of layers that are the rows of one: each with columns of its own, zeros beside them."""
    if len(parts) > 1:
        # Of another dtype, what is absent would change that of the whole.
        dtype = next(layers[part]["lora_B"].dtype for part in parts if part in layers)
        return torch.block_diag(
            *(
                layers[part]["lora_B"]
                if part in layers
                else torch.zeros(_shape_of(transformer, part)[0], 0, dtype=dtype)
                for part in parts
            )
        )
    rows = layers[parts[0]]["lora_B"]
    return rows.roll(rows.shape[0] // 2, dims=0) if parts[0] == SCALE_BEFORE_SHIFT else rows


def _shape_of(transformer: FluxTransformer2DModel, layer: str) -> tuple[int, ...]:
    return tuple(transformer.get_parameter(f"{layer}.weight").shape)


def _lycoris_tensors(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        name = f"lycoris_{layer.replace('.', '_')}"
        tensors |= {f"{name}.{role}": tensor for role, tensor in factors.items()}
        rank = factors["lokr_w2_b"].shape[0] if "lokr_w2_b" in factors else 1  # of two whole ones it does not count
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return tensors


def weight_changes(
    transformer: FluxTransformer2DModel,
    read_base: ReadTensor,
    layers: Mapping[str, Factors],
    *,
    widens_input: bool,
    dtype: torch.dtype,
) -> tuple[dict[str, TensorSpec], ReadTensor]:
    """A DoRA for ComfyUI, which knows none of FLUX.1: what it changes of each weight, as large as the weight.

    Of an expanded FLUX.1-dev the input layer is a LoRA of full rank: only to a LoRA does ComfyUI widen a layer.
    Returns (what the file will hold, its reader): one weight is held at a time.
    """
    specs: dict[str, TensorSpec] = {}
    readers: dict[str, Callable[[], Tensor]] = {}

    def change(layer: str) -> Tensor:
        base = read_base(f"{layer}.weight").float()
        return merge(base, layers[layer]).sub_(base).to(dtype)

    for layer in layers:
        rows, columns = _shape_of(transformer, layer)
        name = f"transformer.{layer}"
        if widens_input and layer == INPUT_LAYER:
            more = {
                f"{name}.lora_A.weight": torch.eye(columns, dtype=dtype),
                f"{name}.reshape_weight": torch.tensor([rows, columns]),
            }
            specs |= {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in more.items()}
            readers |= {key: lambda tensor=tensor: tensor for key, tensor in more.items()}  # type: ignore[misc]
            name += ".lora_B.weight"
        else:
            name += DIFF
        specs[name] = TensorSpec(dtype, (rows, columns))
        readers[name] = lambda layer=layer: change(layer)  # type: ignore[misc]
    return specs, lambda name: readers[name]()


def read_changed(read_base: ReadTensor, read: ReadTensor, names: set[str]) -> ReadTensor:
    """Reader of a base's tensors with the changes of `weight_changes` added.  names: of the changes' file."""

    def read_sum(name: str) -> Tensor:
        layer = f"transformer.{name.removesuffix('.weight')}"
        base = read_base(name).float()
        if f"{layer}{DIFF}" in names:
            return base + read(f"{layer}{DIFF}").float()
        if f"{layer}.lora_B.weight" in names and name.endswith(".weight"):
            return base + read(f"{layer}.lora_B.weight").float() @ read(f"{layer}.lora_A.weight").float()
        return base

    return read_sum
