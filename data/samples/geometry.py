"""Aspect-ratio buckets, and the one call that resizes and crops picture, source and mask together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from configs.flux_shape import LATENT_CHANNELS, PATCH, VAE_FACTOR

MAX_ASPECT = 2.0  # longest bucket side / shortest


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels, both sides multiples of 16."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def tokens(self) -> int:
        """Number of image tokens the transformer sees."""
        return (self.height // PATCH) * (self.width // PATCH)

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        return self.height // VAE_FACTOR, self.width // VAE_FACTOR

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of the latents."""
        return LATENT_CHANNELS, *self.latent_size

    @property
    def mask_bytes(self) -> int:
        """Bytes of a stored mask: 8 pixels each."""
        return self.height * self.width // 8

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """The bucket that `str` names: "512x768" is 512 high and 768 wide."""
        height, width = text.split("x")
        return cls(int(height), int(width))


@dataclass(frozen=True)
class Crop:
    """Resize the whole picture to (width, height), then cut the bucket's size at (left, top)."""

    width: int
    height: int
    left: int
    top: int


@dataclass(frozen=True)
class Pixels:
    """A triple at its bucket's size.

    target: uint8 [H, W, 3]   what the model shall paint.
    image:  uint8 [H, W, 3]   what it sees around the hole (the source picture, or the target itself).
    mask:   bool  [H, W]      True = paint here.
    """

    target: np.ndarray
    image: np.ndarray
    mask: np.ndarray


def buckets_of(resolution: int) -> list[Bucket]:
    """All buckets of about resolution x resolution pixels, from 1:2 to 2:1.

    One side steps by a sixteenth of the resolution (in multiples of 16), the other is what keeps the area; every bucket
    has its mirror.
    """
    step = max(PATCH, resolution // 16 // PATCH * PATCH)
    found = {Bucket(resolution, resolution)}
    side = resolution
    while side > PATCH:
        side -= step
        other = round(resolution * resolution / side / PATCH) * PATCH
        if other > MAX_ASPECT * side:
            break
        found |= {Bucket(side, other), Bucket(other, side)}
    return sorted(found)


def choose_buckets(width: int, height: int, resolutions: Sequence[int], *, policy: str) -> list[Bucket]:
    """The bucket(s) a picture trains in.

    Per resolution, the bucket of the nearest aspect ratio. Policy "each" keeps one per resolution; "one" keeps the
    largest that the picture fills without being enlarged, or the smallest if it fills none.
    """
    nearest = [
        min(buckets_of(resolution), key=lambda b: (abs(np.log(b.width * height / (b.height * width))), b))
        for resolution in sorted(resolutions)
    ]
    if policy == "each":
        return list(dict.fromkeys(nearest))
    filled = [bucket for bucket in nearest if width >= bucket.width and height >= bucket.height]
    return [filled[-1] if filled else nearest[0]]


def plan_crop(width: int, height: int, bucket: Bucket) -> Crop:
    """Cover the bucket with the picture, aspect kept, and cut from the middle."""
    scale = max(bucket.width / width, bucket.height / height)
    resized_width = max(bucket.width, round(width * scale))
    resized_height = max(bucket.height, round(height * scale))
    return Crop(
        resized_width, resized_height, (resized_width - bucket.width) // 2, (resized_height - bucket.height) // 2
    )


def fit(target: Image.Image, mask: Image.Image, source: Image.Image | None, bucket: Bucket) -> Pixels:
    """Bring a triple to its bucket's size, all three pictures by the same crop.

    target, source: RGB; mask: L; all of one size.  Lanczos for pictures and mask, the mask cut at one half afterwards:
    what FluxFillPipeline's processors do.  Raises ValueError if the sizes differ.
    """
    sizes = {picture.size for picture in (target, mask, source) if picture is not None}
    if len(sizes) != 1:
        raise ValueError(f"target, mask and source differ in size: {sorted(sizes)}")
    target_pixels = _cut(target, bucket)
    image_pixels = target_pixels if source is None else _cut(source, bucket)
    return Pixels(target_pixels, image_pixels, fit_mask(mask, bucket))


def fit_mask(mask: Image.Image, bucket: Bucket) -> np.ndarray:
    """A triple's mask, mode L, as `fit` brings it to its bucket's size: bool [H, W]."""
    return _cut(mask, bucket) >= 128


def _cut(picture: Image.Image, bucket: Bucket) -> np.ndarray:
    crop = plan_crop(*picture.size, bucket)
    if picture.size != (crop.width, crop.height):
        picture = picture.resize((crop.width, crop.height), Image.Resampling.LANCZOS)
    return np.asarray(picture.crop((crop.left, crop.top, crop.left + bucket.width, crop.top + bucket.height)))
