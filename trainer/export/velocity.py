"""The velocity of a model whose weights are read layer by layer, and the comparison of an export's with the run's.

A model of 12 billion weights is run in the memory of its largest layer: the probe is of a few tokens, and reading the
weights is the work.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from data.storage.safetensors_file import ReadTensor

log = logging.getLogger("fluxfill")

# Largest difference of two velocities over their size (Euclidean norms), by the dtype that the weights were rounded to.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float8_e4m3fn: 0.25}


@torch.no_grad()
def velocity(transformer: FluxTransformer2DModel) -> Tensor:
    """The model's output on a fixed small input, 4 tokens of picture and 16 of text: fp32 [1, 4, 64]."""
    config, dtype = transformer.config, torch.float32 if transformer.device.type == "meta" else transformer.dtype
    device = torch.device("cpu") if transformer.device.type == "meta" else transformer.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    was_training = transformer.training
    transformer.eval()
    output = transformer(
        hidden_states=random(1, 4, config.in_channels),
        encoder_hidden_states=random(1, 16, config.joint_attention_dim),
        pooled_projections=random(1, config.pooled_projection_dim),
        timestep=torch.full((1,), 0.5, device=device),
        guidance=torch.full((1,), 30.0, device=device),
        img_ids=torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], device=device),
        txt_ids=torch.zeros(16, 3, device=device),
        return_dict=False,
    )[0]
    transformer.train(was_training)
    return output.float()


def streamed_velocity(transformer: FluxTransformer2DModel, read: ReadTensor) -> Tensor:
    """`velocity` of a model on the meta device, whose parameters `read` gives by name as they are needed, in fp32."""
    with ExitStack() as stack:
        for name, module in _units(transformer):
            stack.enter_context(_filled_while_called(name, module, read))
        return velocity(transformer)


def _units(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules whose parameters are needed at the same time: a layer with its adapter, else each with parameters."""
    if isinstance(module, BaseTunerLayer) or any(True for _ in module.parameters(recurse=False)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _units(child, f"{name}.{child_name}" if name else child_name)


@contextmanager
def _filled_while_called(name: str, module: nn.Module, read: ReadTensor) -> Iterator[None]:
    empty = dict(module.named_parameters())

    def put(parameter_name: str, parameter: nn.Parameter) -> None:
        owner, _, attribute = parameter_name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, parameter)

    def fill(*_: Any) -> None:
        for parameter_name in empty:
            put(parameter_name, nn.Parameter(read(f"{name}.{parameter_name}").float(), requires_grad=False))

    def clear(*_: Any) -> None:
        for parameter_name, parameter in empty.items():
            put(parameter_name, parameter)

    hooks = [module.register_forward_pre_hook(fill), module.register_forward_hook(clear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        clear()


def refuse_other_velocity(live: Tensor, exported: Tensor, place: Path, dtype: torch.dtype) -> None:
    """Raise RuntimeError if an export's velocity is not the run's, up to what rounding to `dtype` may change."""
    apart = ((exported - live).norm() / live.norm()).item()
    if not apart <= TOLERANCE[dtype]:  # a difference that is not a number is one
        raise RuntimeError(f"{place}: read back, it gives another velocity than the run's (apart by {apart:.2g})")
    log.info("%s: read back, velocity apart from the run's by %.1g", place, apart)
