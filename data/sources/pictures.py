"""Opening pictures that strangers made: checked before they are decoded, upright, in RGB of the colour space sRGB."""

import io
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from configs.dataset_schema import Label
from configs.errors import InputError
from data.sources.colours import has_alpha, to_srgb, to_srgb_from_16_bits
from data.sources.deep_samples import has_deep_samples, raw_mode, read_deep_samples
from data.sources.file_signatures import foreign_colours, format_by_signature, png_chunks
from data.sources.mask_levels import select_label
from data.sources.picture_file import PictureBytes, PictureFile, byte_limit
from data.sources.tiff_layout import as_tiff_shows, describe_tiff, tiff_problem

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
)
# Pillow's other readers are code that no picture here needs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", *(("AVIF",) if features.check("avif") else ()))

# The most bytes that one profile or text in a PNG may unpack to. Pillow's own limit, 1 MiB, is below what scanners'
# profiles and the workflows of image generators take.
_METADATA_LIMIT = 16 << 20
PngImagePlugin.MAX_TEXT_CHUNK = _METADATA_LIMIT

# A picture is resized until its short side fills the bucket, so a strip of a few pixels would become gigapixels: at 32
# it takes 16 times the bucket's area, no more than a large photograph.
LONGEST_ASPECT = 32

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> how the stored picture is turned to stand upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = frozenset({5, 6, 7, 8})  # the stored width is the upright height
_PNG_METADATA = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})  # where Pillow looks for EXIF and XMP


Picture = Path | PictureFile | PictureBytes


def read_picture(picture: Picture, *, max_megapixels: float, stop: threading.Event | None = None) -> PictureBytes:
    """A picture's bytes, as they are. Raises InputError if it is missing, cannot be read, or is too large for one of
    `max_megapixels`; StorageFailed if its storage keeps failing, or fails once `stop` is set."""
    if isinstance(picture, PictureBytes):
        return picture
    file = PictureFile(str(picture)) if isinstance(picture, Path) else picture
    return file.read(byte_limit(max_megapixels), stop=stop)


def _open(picture_bytes: PictureBytes, max_megapixels: float) -> ImageFile.ImageFile:
    """An opened, not yet decoded picture. Raises InputError if it is none, or refused as `_refuse` says."""
    # Pillow's own limit is one for the whole process and may lie below the user's; the check below stands in for it.
    Image.MAX_IMAGE_PIXELS = None
    try:
        picture = Image.open(io.BytesIO(picture_bytes.data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise InputError(f"{picture_bytes}: {_describe_unread(picture_bytes.data)}") from None
    except Exception as error:  # Pillow raises a dozen types for bytes that are no picture
        raise _unreadable(picture_bytes, "not a readable picture", error) from error
    try:
        _refuse(picture, picture_bytes, max_megapixels)
    except Exception as error:
        picture.close()
        if isinstance(error, InputError):
            raise
        raise _unreadable(picture_bytes, "not a readable picture", error) from error
    return picture


def _refuse(picture: ImageFile.ImageFile, picture_bytes: PictureBytes, max_megapixels: float) -> None:
    """Raise InputError if a picture is too large or too long to decode, or would be decoded to something else than it
    shows."""
    megapixels = picture.width * picture.height / 1e6
    if megapixels > max_megapixels:
        raise InputError(
            f"{picture_bytes}: {picture.width}x{picture.height} is {megapixels:.0f} megapixels, above "
            f"data.max_megapixels {max_megapixels:g}; it was not decoded. Shrink the picture or raise the limit."
        )
    if max(picture.size) > LONGEST_ASPECT * min(picture.size):
        raise InputError(
            f"{picture_bytes}: {picture.width}x{picture.height} is more than {LONGEST_ASPECT} times as long as wide: "
            "next to nothing of it would be left at the size that is trained. Cut it into pictures, or remove it."
        )
    problem = _problem(picture, picture_bytes.data)
    if problem:
        raise InputError(f"{picture_bytes}: {problem}. Save it as PNG of 8 bits.")


def _problem(picture: ImageFile.ImageFile, data: bytes) -> str:
    """Why an opened picture would be decoded to something else than it shows, "" if it would not."""
    if picture.mode in ("I", "F"):
        return "has 32-bit pixels, whose white is anyone's guess"
    if isinstance(picture, TiffImageFile):
        return tiff_problem(picture, data)
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # of an MPO, the first is the photograph
        return f"is an animation of {frames} frames, and nothing says which is meant"
    colours = "" if picture.info.get("icc_profile") else foreign_colours(data, picture.format)
    if colours:
        return f"has colours other than sRGB ({colours}), and no profile that says how to show them"
    return ""


def _describe_unread(data: bytes) -> str:
    if not data:
        return "not a readable picture (the file is empty). Replace or remove the file."
    if data.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, which stands for the picture. Run `git lfs pull`."
    layout = describe_tiff(data)
    if layout:
        return f"a TIFF of a layout that is not read ({layout}). Save it as PNG of 8 bits."
    named = format_by_signature(data)
    if named:
        return f"not a readable picture (kind: {named}). Convert it to PNG of 8 bits, or restore or remove the file."
    return (
        f"not a readable picture (not one of {', '.join(_FORMATS)}: it begins with {data[:16]!r}). Replace or remove "
        "the file, or convert it to PNG."
    )


def _unreadable(name: object, what: str, error: Exception) -> InputError:
    if "MAX_TEXT" in str(error):
        return InputError(
            f"{name}: its profile or its texts unpack to more than {_METADATA_LIMIT >> 20} MiB. Strip its metadata "
            "(`exiftool -all= FILE`)."
        )
    return InputError(f"{name}: {what} ({error}). Replace or remove the file.")


def _decode(picture: Image.Image, name: object) -> None:
    try:
        picture.load()
    except Exception as error:
        raise _unreadable(name, "cannot be decoded", error) from error


def _orientation(picture: Image.Image) -> int:
    """How an opened picture is stored, 1 to 8; 1 (upright) if it does not say, or says it in damaged EXIF."""
    if picture.format == "TIFF":
        return 1  # Pillow turns these itself, size and pixels
    try:
        # Not PngImageFile's own, which decodes every picture that has no EXIF ahead of its pixels.
        return int(Image.Image.getexif(picture).get(_ORIENTATION_TAG, 1))
    except Exception:  # viewers too show a picture with damaged EXIF as it is stored
        return 1


def _says_more_behind_its_pixels(png: bytes) -> bool:
    """Whether a PNG holds metadata behind its pixels, as some tools write it: seen only by decoding."""
    kinds = [kind for kind, _ in png_chunks(png)]
    return b"IDAT" in kinds and not _PNG_METADATA.isdisjoint(kinds[kinds.index(b"IDAT") :])


class Header(NamedTuple):
    """width, height: upright.  orientation: EXIF's, by which a picture is turned to stand so; 1 = not at all."""

    width: int
    height: int
    orientation: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) before it is turned."""
        return (self.height, self.width) if self.orientation in QUARTER_TURNS else (self.width, self.height)


def read_header(picture_file: Picture, *, max_megapixels: float) -> Header:
    """Size of a picture that is not decoded. Raises InputError as `load_picture` does."""
    read = read_picture(picture_file, max_megapixels=max_megapixels)
    with _open(read, max_megapixels) as picture:
        if picture.format == "PNG" and _says_more_behind_its_pixels(read.data):
            _decode(picture, read)
        width, height = picture.size
        orientation = _orientation(picture)
        return Header(*((height, width) if orientation in QUARTER_TURNS else (width, height)), orientation)


def picture_size(picture_file: Picture, *, max_megapixels: float) -> tuple[int, int]:
    """Upright (width, height) of a picture, from its header. Raises InputError as `load_picture` does."""
    header = read_header(picture_file, max_megapixels=max_megapixels)
    return header.width, header.height


def _decode_upright(picture: ImageFile.ImageFile, name: object) -> Image.Image:
    """A picture's pixels as it is stored, in any mode, upright."""
    spread = {"L;2": 85, "L;4": 17}.get(raw_mode(picture))
    if spread is not None and "transparency" in picture.info:  # Pillow spreads levels over 0 to 255, and forgets this
        picture.info["transparency"] *= spread
    _decode(picture, name)
    shown = as_tiff_shows(picture) if isinstance(picture, TiffImageFile) else picture
    orientation = _orientation(picture)
    return shown.transpose(_TURNS[orientation]) if orientation in _TURNS else shown


def load_picture(picture_file: Picture, *, max_megapixels: float) -> Image.Image:
    """A decoded, upright picture in sRGB; transparent parts stand on white.

    Raises InputError, naming the file, if it is missing, unreadable, has more than `max_megapixels` pixels or is above
    LONGEST_ASPECT (then it is refused before decoding: a file of some kilobytes can hold gigapixels).
    """
    read = read_picture(picture_file, max_megapixels=max_megapixels)
    with _open(read, max_megapixels) as picture:
        if not has_deep_samples(picture):
            return to_srgb(_decode_upright(picture, read))
        profile = picture.info.get("icc_profile")
    samples = read_deep_samples(lambda: _open(read, max_megapixels), lambda opened: _decode_upright(opened, read))
    return to_srgb_from_16_bits(samples.colours, samples.alpha, profile, premultiplied=samples.premultiplied)


def load_preview(picture_file: Picture, cell: int, *, max_megapixels: float) -> np.ndarray:
    """A grey, upright picture in which every pixel is the mean of cell x cell ones: uint8 [ceil(H / cell), ceil(W /
    cell)]. Raises as `load_picture` does.

    cell: a power of two.  A JPEG is decoded at that size, up to an eighth, and colour profiles are passed over, so two
    pictures can be compared that have the same one.
    """
    read = read_picture(picture_file, max_megapixels=max_megapixels)
    with _open(read, max_megapixels) as picture:
        width, height = picture.size
        is_plain = picture.format in ("JPEG", "MPO", "PNG") and picture.mode in ("L", "RGB")
        if is_plain and (_orientation(picture) == 1 or not (width % cell or height % cell)):
            picture.draft("L", (max(1, width // cell), max(1, height // cell)))
            upright = _decode_upright(picture, read)
            rest = cell * max(upright.size) // max(width, height)
            return np.asarray((upright.reduce(rest) if rest > 1 else upright).convert("L"))
    return np.asarray(load_picture(read, max_megapixels=max_megapixels).reduce(cell).convert("L"))


def load_stored(picture_file: Picture, *, max_megapixels: float) -> Image.Image:
    """A decoded, upright picture in the mode it is stored in. Raises as `load_picture` does."""
    read = read_picture(picture_file, max_megapixels=max_megapixels)
    with _open(read, max_megapixels) as picture:
        return _decode_upright(picture, read)


def load_mask(picture_file: Picture, *, max_megapixels: float, label: Label | None = None) -> Image.Image:
    """A decoded, upright mask in mode L: white (255) = repaint, black (0) = keep. label: which value of its pixels is
    the hole, where they are labels.

    Raises as `load_picture` does, and where transparency says other than the colours. Some programs mean by it what is
    to be painted, some what is not; only a person can tell.
    """
    read = read_picture(picture_file, max_megapixels=max_megapixels)
    picture = load_stored(read, max_megapixels=max_megapixels)
    if label is not None:
        return select_label(picture, label)
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255: all but the darkest grey would be white.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    # Pillow knows the way from Lab to RGB, but none to grey.
    grey = picture.convert("RGB") if picture.mode == "LAB" else picture
    mask = grey if grey.mode == "L" else grey.convert("L")
    if has_alpha(picture) and not _agree(np.asarray(mask), np.asarray(picture.convert("RGBA").getchannel("A"))):
        raise InputError(
            f"{read}: the mask is partly transparent, and its colours do not say which part is the hole. Save it "
            "without transparency: white = repaint, black = keep."
        )
    return mask


def _agree(levels: np.ndarray, alpha: np.ndarray) -> bool:
    """Whether a mask means the same without its alpha: either nothing is transparent, or what is transparent is of one
    colour, white or black, and what is not of the other. Edges, half transparent, may have either."""
    strongest = int(alpha.max())
    clear, covered = levels[alpha <= strongest // 4] >= 128, levels[alpha > strongest - strongest // 4] >= 128
    if strongest == 0 or not clear.size:
        return True
    return bool(clear.all() and not covered.any()) or bool(covered.all() and not clear.any())
