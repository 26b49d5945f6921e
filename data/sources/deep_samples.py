"""Samples of 16 bits, of which Pillow gives the upper 8: the lower ones are had by decoding in the other byte order."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile


class DeepSamples(NamedTuple):
    """colours: uint16 [H, W, C], C 1 (grey), 3 (RGB) or 4 (CMYK).  alpha: uint16 [H, W], by which the colours are
    multiplied already if `premultiplied`."""

    colours: np.ndarray
    alpha: np.ndarray | None
    premultiplied: bool


def raw_mode(picture: ImageFile.ImageFile) -> str:
    """How the samples of an opened, not yet decoded picture lie in its file: "RGB;16B"; "" if unknown."""
    if len(picture.tile) != 1:
        return ""
    args = picture.tile[0].args
    return args if isinstance(args, str) else str(args[0]) if args else ""


def has_deep_samples(picture: ImageFile.ImageFile) -> bool:
    """Whether an opened, not yet decoded picture has more than 8 bits a channel."""
    # Not "BGR;16", which is 16 bits a pixel.
    return picture.mode.startswith("I;16") or raw_mode(picture).endswith((";16B", ";16L", ";16N"))


def read_deep_samples(
    open_picture: Callable[[], ImageFile.ImageFile], decode: Callable[[ImageFile.ImageFile], Image.Image]
) -> DeepSamples:
    """All 16 bits of a picture's samples. decode: gives an opened picture's pixels, upright."""
    picture = open_picture()
    mode, layout = picture.mode, raw_mode(picture)
    if mode.startswith("I;16"):
        grey = np.asarray(decode(picture)).astype(np.uint16)
        key = picture.info.get("transparency")
        alpha = None if key is None else np.where(grey == key, 0, 65535).astype(np.uint16)
        return DeepSamples(grey[..., None], alpha, False)
    if layout == "LA;16B":  # four bytes, as RGBA of 8 bits has them
        grey_high, grey_low, alpha_high, alpha_low = np.moveaxis(_decode_as("RGBA", picture, decode), -1, 0)
        return DeepSamples((grey_high << 8 | grey_low)[..., None], alpha_high << 8 | alpha_low, False)
    kind, _, order = layout.partition(";16")
    big = order == "B" or (order == "N" and sys.byteorder == "big")
    premultiplied, kind = kind == "RGBa", kind.replace("a", "A")
    high = _decode_as(f"{kind};16{'B' if big else 'L'}", picture, decode)
    low = _decode_as(f"{kind};16{'L' if big else 'B'}", open_picture(), decode)
    samples = high << 8 | low
    channels = 4 if mode == "CMYK" else 3
    alpha = samples[..., channels] if mode == "RGBA" else None
    key = picture.info.get("transparency")
    if key is not None:
        alpha = np.where((samples == np.array(key, np.uint16)).all(axis=-1), 0, 65535).astype(np.uint16)
    return DeepSamples(samples[..., :channels], alpha, premultiplied)


def _decode_as(
    layout: str, picture: ImageFile.ImageFile, decode: Callable[[ImageFile.ImageFile], Image.Image]
) -> np.ndarray:
    tile = picture.tile[0]
    args = layout if isinstance(tile.args, str) else (layout, *(tile.args or ())[1:])
    picture.tile = [tile._replace(args=args)]
    return np.asarray(decode(picture)).astype(np.uint16)
