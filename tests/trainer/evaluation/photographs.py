"""Real photographs with holes, and what may be wrong with a fill of them."""

import torch
from scipy.ndimage import gaussian_filter
from skimage import data
from torch import Tensor

PLACES = {"astronaut": (20, 150), "chelsea": (40, 80), "coffee": (60, 180), "rocket": (180, 200)}


def photograph(name: str) -> Tensor:
    """128 x 128 pixels of one of scikit-image's photographs, fp32 [3, H, W] in [0, 1]."""
    top, left = PLACES[name]
    pixels = getattr(data, name)()[top : top + 128, left : left + 128]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def hole() -> Tensor:
    """A hole of 56 x 56 pixels in the middle."""
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[36:92, 36:92] = True
    return mask


def blurred(picture: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(picture.numpy(), (0, sigma, sigma)))


def tinted(picture: Tensor, amount: float) -> Tensor:
    """A cast of red, as strong everywhere."""
    return (picture + torch.tensor([amount, 0.0, -amount])[:, None, None]).clamp(0, 1)


def shifted(picture: Tensor, pixels: int) -> Tensor:
    """The same picture a few pixels to the right: inside a hole all lines break at its edge."""
    return torch.roll(picture, pixels, dims=2)


def in_hole(fill: Tensor, picture: Tensor) -> Tensor:
    return torch.where(hole(), fill, picture)
