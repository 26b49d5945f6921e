"""The sizes of a FLUX.1 transformer, and the parameters that it and its adapters have: from config.json, without
torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from configs.adapter_targets import BLOCK, AdapterConfig, choose_layers
from configs.errors import InputError
from configs.schema import FullConfig

LATENT_CHANNELS = 16  # of FLUX.1's VAE
VAE_FACTOR = 8  # pixels per latent side: the VAE halves three times
PATCH = 2 * VAE_FACTOR  # pixels per token side: FLUX packs 2x2 latents into one token
FILL_CHANNELS, DEV_CHANNELS = 384, 64
_TIMESTEP_WIDTH = 256  # of the sinusoids that FLUX.1 embeds a timestep by
_EXPANDED_INPUT, _EXPANDED_RANK = "x_embedder", 320  # what an adapter on FLUX.1-dev adapts too, and its least rank


@dataclass(frozen=True)
class FluxShape:
    """double_blocks, single_blocks: how many.  width: features of a token.  head_width: of those, of one head.
    text_width, pooled_width: of T5's tokens and of CLIP's text.  in_channels: 384 of Fill, 64 of dev."""

    double_blocks: int = 19
    single_blocks: int = 38
    width: int = 3072
    head_width: int = 128
    text_width: int = 4096
    pooled_width: int = 768
    in_channels: int = FILL_CHANNELS

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "FluxShape":
        """The sizes of a transformer's config.json; what it does not name is as diffusers' class has it."""
        head_width = config.get("attention_head_dim", 128)
        return cls(
            config.get("num_layers", 19),
            config.get("num_single_layers", 38),
            head_width * config.get("num_attention_heads", 24),
            head_width,
            config.get("joint_attention_dim", 4096),
            config.get("pooled_projection_dim", 768),
            config.get("in_channels", DEV_CHANNELS),
        )

    @property
    def blocks(self) -> int:
        return self.double_blocks + self.single_blocks

    @cached_property
    def parameters(self) -> int:
        """Of the whole transformer, biases and norms too."""
        norms = self.head_width * (4 * self.double_blocks + 2 * self.single_blocks)
        return norms + sum(rows * columns + rows for columns, rows in self.linear_layers().values())

    @cached_property
    def block_weights(self) -> int:
        """Of the blocks' linear layers, without biases: what a quantized base holds in 4 or 8 bits."""
        layers = self.linear_layers().items()
        return sum(columns * rows for name, (columns, rows) in layers if re.match(BLOCK, name))

    @cached_property
    def block_rows(self) -> int:
        """Rows of these layers' weights."""
        return sum(rows for name, (_, rows) in self.linear_layers().items() if re.match(BLOCK, name))

    @cached_property
    def double_block_parameters(self) -> int:
        """About what one double block has, the larger kind."""
        return sum(
            c * r + r for name, (c, r) in self.linear_layers().items() if name.startswith("transformer_blocks.0.")
        )

    def linear_layers(self) -> Mapping[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of every linear layer, called as diffusers' FluxTransformer2DModel calls them."""
        return _linear_layers(self)


@cache  # a plan asks for it a thousand times
def _linear_layers(shape: FluxShape) -> Mapping[str, tuple[int, int]]:
    h = shape.width
    layers = {"x_embedder": (shape.in_channels, h), "context_embedder": (shape.text_width, h)}
    embedders = {"timestep": _TIMESTEP_WIDTH, "guidance": _TIMESTEP_WIDTH, "text": shape.pooled_width}
    for name, inputs in embedders.items():
        layers[f"time_text_embed.{name}_embedder.linear_1"] = (inputs, h)
        layers[f"time_text_embed.{name}_embedder.linear_2"] = (h, h)
    square = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    double = {
        **{f"{norm}.linear": (h, 6 * h) for norm in ("norm1", "norm1_context")},
        **{f"attn.{name}": (h, h) for name in square},
        **{f"{ff}.net.0.proj": (h, 4 * h) for ff in ("ff", "ff_context")},
        **{f"{ff}.net.2": (4 * h, h) for ff in ("ff", "ff_context")},
    }
    single = {
        "norm.linear": (h, 3 * h),
        **{f"attn.{name}": (h, h) for name in ("to_q", "to_k", "to_v")},
        "proj_mlp": (h, 4 * h),
        "proj_out": (5 * h, h),
    }
    for kind, count, of_each in (
        ("transformer_blocks", shape.double_blocks, double),
        ("single_transformer_blocks", shape.single_blocks, single),
    ):
        layers |= {f"{kind}.{i}.{name}": sides for i in range(count) for name, sides in of_each.items()}
    return layers | {"norm_out.linear": (h, 2 * h), "proj_out": (h, DEV_CHANNELS)}


@cache  # a plan asks for it at every micro-batch size
def trained_parameters(method: AdapterConfig | FullConfig, base: FluxShape) -> int:
    """Parameters that a method trains on a base, whose inputs are expanded to Fill's where it is FLUX.1-dev.

    Raises InputError for targets that it has not.
    """
    if method.type == "full":
        return expanded(base).parameters
    layers = expanded(base).linear_layers()
    chosen = choose_layers(list(layers), method)
    count = sum(_adapter_parameters(method, method.rank, *layers[name]) for name in chosen)
    if base.in_channels == DEV_CHANNELS:
        rank = max(_EXPANDED_RANK, method.rank)
        count += _adapter_parameters(method, rank, FILL_CHANNELS, base.width)
    return count


def checkpointed_blocks(setting: bool | int, base: FluxShape) -> int:
    """How many blocks train.activation_checkpointing means. Raises InputError for more than there are."""
    if isinstance(setting, bool):
        return base.blocks if setting else 0
    if setting > base.blocks:
        raise InputError(
            f"train.activation_checkpointing is {setting}, and the model has {base.blocks} blocks "
            f"({base.double_blocks} double and {base.single_blocks} single). Lower it, or set it to true for all."
        )
    return setting


@cache
def expanded(base: FluxShape) -> FluxShape:
    """The shape with Fill's inputs, as it is trained."""
    return replace(base, in_channels=FILL_CHANNELS)


def _adapter_parameters(method: AdapterConfig, rank: int, inputs: int, outputs: int) -> int:
    if method.type == "lokr":
        factor = None if method.factor == "auto" else method.factor
        (small_rows, rows), (small_columns, columns) = _factors(outputs, factor), _factors(inputs, factor)
        is_whole = rank >= max(rows, columns) / 2
        return small_rows * small_columns + (rows * columns if is_whole else rank * (rows + columns))
    return rank * (inputs + outputs) + (outputs if method.type == "dora" else 0)


def _factors(side: int, factor: int | None) -> tuple[int, int]:
    """The two numbers that LoKr writes a layer's side as the product of, the smaller first; near `factor`, or equal."""
    if factor is not None and side % factor == 0:
        return factor, side // factor
    most = min(math.isqrt(side), side if factor is None else factor)
    small = next(number for number in range(most, 0, -1) if side % number == 0)
    return small, side // small
