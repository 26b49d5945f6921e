"""Samples of any mode and depth, and the profile that says what they mean -> sRGB as the VAE takes it."""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# The colour space of a profile -> the mode of its samples.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
_LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # what a picture in Lab means by itself
_BAND_PIXELS = 1 << 20  # how many pixels of 16 bits are converted at a time


def has_alpha(picture: Image.Image) -> bool:
    """Whether some of a picture may be transparent."""
    return "A" in picture.getbands() or "transparency" in picture.info


def to_srgb(picture: Image.Image) -> Image.Image:
    """A picture of 8 bits per channel in RGB: the colours that its profile means, transparent parts on white."""
    rgba = picture.convert("RGBA") if has_alpha(picture) else None
    if picture.mode in ("1", "L", "LA"):
        colours = picture.convert("L")
    elif picture.mode in _MODES.values():
        colours = picture
    else:
        colours = (rgba or picture).convert("RGB")
    rgb = _convert(colours, picture.info.get("icc_profile"))
    if rgba is None:
        return rgb
    rgb.putalpha(rgba.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


def to_srgb_from_16_bits(
    colours: np.ndarray, alpha: np.ndarray | None, profile: bytes | None, *, premultiplied: bool
) -> Image.Image:
    """As `to_srgb`, of samples of 16 bits, rounded to 8 at the end: a curve or a matrix on rounded samples would be
    some levels off.

    colours: uint16 [H, W, C], C 1 (grey), 3 (RGB) or 4 (CMYK).  alpha: uint16 [H, W], by which the colours are
    multiplied already if `premultiplied`.
    """
    height, width, _ = colours.shape
    rgb = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = slice(top, top + rows)
        levels = colours[band] / np.float32(257)
        if alpha is None:
            shown = _interpolate(levels, profile)
        else:
            opaque = alpha[band, :, None] / np.float32(65535)
            if premultiplied:
                levels = np.minimum(levels / np.maximum(opaque, np.float32(1e-6)), 255)
            shown = _interpolate(levels, profile) * opaque + 255 * (1 - opaque)
        rgb[band] = np.rint(shown)
    return Image.fromarray(rgb)


def _interpolate(levels: np.ndarray, profile: bytes | None) -> np.ndarray:
    """As `_convert`, of levels in between whole ones: float32 [H, W, 3].

    levels: float32 [H, W, C], 0 to 255.  Between the corners of a cell one goes along each axis in turn, the longest
    way first: so grey stays grey.
    """
    channels = np.arange(levels.shape[-1])
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[len(channels)]
    if mode != "CMYK" and _find_converter(profile, mode) is None:
        return np.broadcast_to(levels, (*levels.shape[:-1], 3))

    def convert(corner: np.ndarray) -> np.ndarray:
        picture = Image.frombytes(mode, (corner.shape[1], corner.shape[0]), corner.tobytes())
        return np.asarray(_convert(picture, profile), dtype=np.float32)

    corner = np.minimum(levels, 254).astype(np.uint8)
    part = levels - corner
    order = np.argsort(-part, axis=-1)  # [H, W, C] channels
    steps = np.take_along_axis(part, order, axis=-1)
    result = convert(corner) * (1 - steps[..., :1])
    for index in channels:
        corner = corner + (channels == order[..., index, None]).astype(np.uint8)
        next_step = steps[..., index + 1, None] if index < channels[-1] else 0
        result += convert(corner) * (steps[..., index, None] - next_step)
    return result


def _convert(colours: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque picture in L, RGB, CMYK or LAB -> RGB by its profile."""
    converter = _find_converter(profile, colours.mode)
    if converter is not None:
        return converter(colours)
    return colours if colours.mode == "RGB" else colours.convert("RGB")


def _find_converter(profile: bytes | None, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    if mode == "LAB":
        profile = profile or _LAB
    if not profile:
        return None
    converter = _converter(profile, mode)
    if converter is None and mode == "L" and (of_colours := _converter(profile, "RGB")) is not None:
        return lambda grey: of_colours(grey.convert("RGB"))
    return converter


@lru_cache(maxsize=8)
def _converter(profile_bytes: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """From the colours of a profile to sRGB.

    None if it would change next to nothing, whatever the profile calls itself; and if the profile is damaged, or not
    for samples of this mode: viewers too show the picture as it is then.
    """
    # Unless told not to, littlecms reads all but plain matrices off a coarse grid: up to 18 levels wrong in the dark.
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile_bytes))
        if _MODES.get(profile.profile.xcolor_space.strip()) != mode:
            return None
        if mode != "RGB" or not profile.profile.is_matrix_shaper:
            flags |= ImageCms.Flags.NOOPTIMIZE
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(
            profile, ImageCms.createProfile("sRGB"), mode, "RGB", renderingIntent=intent, flags=flags
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "L":
        levels = transform.apply(Image.frombytes("L", (256, 1), bytes(range(256)))).getchannel("G").tobytes()
        if max(abs(level - shown) for level, shown in enumerate(levels)) <= 1:
            return None
        return lambda grey: grey.point(levels).convert("RGB")
    if mode == "RGB":
        probe = _colours_from_all_over()
        change = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe, np.int16)
        if abs(change).max() <= 1:
            return None
    return transform.apply


def _colours_from_all_over() -> Image.Image:
    levels = np.array([0, 1, 2, 4, 8, 16, *range(32, 256, 16), 255], np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    return Image.fromarray(grid.reshape(len(levels), -1, 3))
