"""The FLUX.1-Fill transformer: loading, the expansion of FLUX.1-dev, and how its 384 inputs are packed.

All formulas are those of diffusers' pipeline_flux_fill.py, and tests hold them to it number by number.
"""

import logging
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from configs.errors import InputError
from configs.flux_shape import LATENT_CHANNELS, VAE_FACTOR
from configs.schema import FlowConfig
from data.batches.micro_batch import MicroBatch, unpack_mask
from data.encoders.model_folder import read_part_config

FILL_CHANNELS = 384  # per token: 64 noisy latents + 64 masked-image latents + 256 mask pixels
DEV_CHANNELS = 4 * LATENT_CHANNELS

log = logging.getLogger("fluxfill")


def pack_latents(latents: Tensor) -> Tensor:
    """Fold each 2x2 patch into one token.

    latents: [B, C, h, w], h and w even.  Returns [B, (h/2)*(w/2), 4*C], row-major over patches, feature
    c*4 + row*2 + column.  Raises ValueError if h or w is odd (the picture's side was no multiple of 16).
    """
    batch, channels, h, w = latents.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents of {h}x{w} cannot be packed 2x2: the picture's sides must be multiples of 16")
    patches = latents.reshape(batch, channels, h // 2, 2, w // 2, 2)
    # [B, C, h/2, 2, w/2, 2] -> [B, h/2, w/2, C, 2, 2] -> [B, L, 4C]
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (h // 2) * (w // 2), channels * 4)


def pack_mask(mask: Tensor) -> Tensor:
    """Every mask pixel becomes a feature of its token: no averaging.

    mask: [B, 1, H, W], sides multiples of 16.  Returns [B, L, 256].
    """
    batch, _, height, width = mask.shape
    h, w = height // VAE_FACTOR, width // VAE_FACTOR
    pixels = mask[:, 0].reshape(batch, h, VAE_FACTOR, w, VAE_FACTOR)
    # [B, h, 8, w, 8] -> [B, 8, 8, h, w] -> [B, 64, h, w]
    return pack_latents(pixels.permute(0, 2, 4, 1, 3).reshape(batch, VAE_FACTOR**2, h, w))


def pack_fill_condition(masked_latents: Tensor, mask: Tensor) -> Tensor:
    """Fill's condition, packed: masked latents [B, 16, h, w] and mask [B, 1, H, W] -> [B, L, 64 + 256]."""
    return torch.cat([pack_latents(masked_latents), pack_mask(mask).to(masked_latents.dtype)], dim=-1)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Positions of the tokens of latents of height x width: fp32 [L, 3], columns (0, row, column)."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] += torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] += torch.arange(width // 2, device=device)[None, :]
    return ids.view(-1, 3)


def predict_velocity(
    transformer: nn.Module, noisy: Tensor, rows: MicroBatch, sigma: Tensor, flow: FlowConfig
) -> Tensor:
    """The model's velocity, packed [B, L, 64].

    noisy: fp32 [B, 16, h, w].  rows: on the model's device; its masked latents, mask and text are the condition.
    sigma: [B].
    """
    condition = pack_fill_condition(rows.masked_latents.float(), unpack_mask(rows.mask))
    h, w = noisy.shape[-2:]
    return transformer(
        hidden_states=torch.cat([pack_latents(noisy), condition], dim=-1),  # [B, L, 384]
        timestep=sigma,
        guidance=torch.full_like(sigma, flow.guidance),
        pooled_projections=rows.pooled.float(),
        encoder_hidden_states=rows.t5.float(),
        txt_ids=torch.zeros(rows.t5.shape[1], 3, device=noisy.device),
        img_ids=image_ids(h, w, device=noisy.device),
        return_dict=False,
    )[0]


def load_transformer(model: Path, *, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The transformer of a model folder with 384 inputs; FLUX.1-dev's 64 are expanded.

    Raises InputError if it cannot be loaded whole, from safetensors, or is neither of the two.
    """
    part = model / "transformer"
    config = _read_config(model)
    try:
        transformer, loading = FluxTransformer2DModel.from_pretrained(
            part, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{part}: cannot be loaded ({error}). Fetch the model again.") from error
    # diffusers only warns of these: what is missing it leaves without values, what it did not expect it drops.
    if strangers := [*loading["missing_keys"], *loading["unexpected_keys"]]:
        raise InputError(
            f"{part}: config.json and weights do not belong together: {len(strangers)} tensors are missing or left "
            f"over, {', '.join(sorted(strangers)[:3])} among them. Fetch the model again."
        )
    if config["in_channels"] == DEV_CHANNELS:
        log.info(
            "model: FLUX.1 with %d inputs, expanded to %d; the new ones start at zero", DEV_CHANNELS, FILL_CHANNELS
        )
        expand_to_fill(transformer)
    return transformer


def empty_transformer(model: Path, *, dtype: torch.dtype) -> FluxTransformer2DModel:
    """`load_transformer`'s model on the meta device, for a rank that gets the values from another."""
    config = _read_config(model)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    nn.Module.to(transformer, dtype).eval()  # diffusers' own warns of parts to keep in fp32; there are none
    if config["in_channels"] == DEV_CHANNELS:
        expand_to_fill(transformer)
    return transformer


def _read_config(model: Path) -> dict:
    """The transformer's config.json, in_channels filled in. Raises InputError if it is no FLUX.1-Fill or FLUX.1-dev."""
    config = {"in_channels": DEV_CHANNELS} | read_part_config(model, "transformer")
    guided = config.get("guidance_embeds", False)
    if config["in_channels"] not in (FILL_CHANNELS, DEV_CHANNELS) or not guided:
        raise InputError(
            f"{model / 'transformer'}: {config['in_channels']} input channels, {'with' if guided else 'without'} "
            f"guidance. Training starts from FLUX.1-Fill-dev ({FILL_CHANNELS} channels) or FLUX.1-dev "
            f"({DEV_CHANNELS}), both with guidance; this is another model."
        )
    return config


def expand_to_fill(transformer: FluxTransformer2DModel) -> None:
    """Give FLUX.1-dev Fill's 320 further inputs per token, with weights 0: its output does not change yet.

    out_channels is written into the config: it defaults to in_channels, and a reload would build another proj_out.
    Neither key stays among those that config.json left to its defaults (FLUX.1-dev's names no out_channels), for
    diffusers' from_config passes those over, whatever value they have by now.
    """
    old = transformer.x_embedder
    new = nn.Linear(FILL_CHANNELS, old.out_features, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_features] = old.weight
        new.bias.copy_(old.bias)
    transformer.x_embedder = new
    channels = {"in_channels": FILL_CHANNELS, "out_channels": transformer.out_channels}
    defaults = [key for key in transformer.config.get("_use_default_values", []) if key not in channels]
    transformer.register_to_config(**channels, _use_default_values=defaults)
