"""Opening pictures that strangers made: checked before they are decoded, upright, in RGB."""

import warnings
from pathlib import Path

from PIL import Image, ImageOps

from configs.errors import InputError

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})

# EXIF orientations that turn a picture by a quarter: its stored width is its upright height.
_QUARTER_TURNS = frozenset({5, 6, 7, 8})
_ORIENTATION_TAG = 0x0112


def _open(path: Path, max_megapixels: float) -> Image.Image:
    """An opened, not yet decoded picture. Raises InputError if it is missing, no picture, or too large to decode."""
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb check is replaced by the limit below, which is an error and not a warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture. Restore the file, or remove its partners.") from None
    except Exception as error:  # Pillow raises a dozen types for bytes that are no picture, bombs included
        raise InputError(f"{path}: not a readable picture ({error}). Replace or remove the file.") from error
    megapixels = picture.width * picture.height / 1e6
    if megapixels > max_megapixels:
        picture.close()
        raise InputError(
            f"{path}: {picture.width}x{picture.height} is {megapixels:.0f} megapixels, above "
            f"data.max_megapixels {max_megapixels:g}; it was not decoded. Shrink the picture or raise the limit."
        )
    return picture


def picture_size(path: Path, *, max_megapixels: float) -> tuple[int, int]:
    """Upright (width, height) of a picture, from its header alone. Raises InputError as `load_picture` does."""
    with _open(path, max_megapixels) as picture:
        width, height = picture.size
        if picture.getexif().get(_ORIENTATION_TAG) in _QUARTER_TURNS:
            width, height = height, width
        return width, height


def _load(path: Path, max_megapixels: float) -> Image.Image:
    with _open(path, max_megapixels) as picture:
        try:
            picture.load()
        except Exception as error:
            raise InputError(f"{path}: cannot be decoded ({error}). Replace or remove the file.") from error
        return ImageOps.exif_transpose(picture)


def load_picture(path: Path, *, max_megapixels: float) -> Image.Image:
    """A decoded, upright RGB picture; transparent parts stand on white.

    Raises InputError, naming the file, if it is missing, unreadable, or has more than `max_megapixels` pixels (then it
    is refused before decoding: a file of some kilobytes can hold gigapixels).
    """
    picture = _load(path, max_megapixels)
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return picture.convert("RGB")


def load_mask(path: Path, *, max_megapixels: float) -> Image.Image:
    """A decoded, upright mask in mode L: white (255) = repaint, black (0) = keep. Raises as `load_picture` does."""
    return _load(path, max_megapixels).convert("L")
