"""What is planned: the model's sizes, the tokens of a sample and the bytes that a cache of them takes."""

from configs.errors import InputError
from configs.flux_shape import DEV_CHANNELS, FILL_CHANNELS, LATENT_CHANNELS, PATCH, VAE_FACTOR, FluxShape
from configs.schema import Config
from data.encoders.model_folder import find_model, is_hub_id, read_part_config

_FLUX = "black-forest-labs/FLUX.1-"


def read_shape(base: str) -> FluxShape:
    """The transformer's sizes, from model.base's config.json; of a hub repository that is not here yet, FLUX.1's.

    Raises InputError if model.base is neither a model folder nor a hub id.
    """
    if is_hub_id(base) and base.startswith(_FLUX):  # known, and half a second of imports less
        return _flux_of(base)
    try:
        return FluxShape.of(read_part_config(find_model(base, download=False), "transformer"))
    except InputError:
        if not is_hub_id(base):
            raise
    return _flux_of(base)


def _flux_of(name: str) -> FluxShape:
    return FluxShape(in_channels=FILL_CHANNELS if "fill" in name.lower() else DEV_CHANNELS)


def sample_tokens(config: Config) -> int:
    """Of a sample of the largest bucket, text included."""
    return (max(config.data.resolution) // PATCH) ** 2 + config.data.captions.text_length


def sample_bytes(config: Config, base: FluxShape, resolution: int) -> int:
    """Of a square picture in the cache with one mask, and a caption of its own."""
    pixels = resolution**2
    latents = 2 * 2 * LATENT_CHANNELS * pixels // VAE_FACTOR**2  # the picture's and the masked one's, in bf16
    each = 2 if config.data.captions.text_dtype == "bf16" else 1
    text = config.data.captions.text_length * base.text_width * each + 2 * base.pooled_width
    return latents + pixels // 8 + text
