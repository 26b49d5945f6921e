"""The VAE as validation uses it: in the compute dtype, picture by picture."""

from pathlib import Path
from typing import Any

import torch

from data.encoders.load import load_vae


def load_sampling_vae(model: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Raises as `load_vae` does."""
    vae = load_vae(model, device=device, dtype=dtype)
    # Decoding four pictures of 1024 px at once would take 10 GiB, more than training on them.
    vae.enable_slicing()
    return vae
