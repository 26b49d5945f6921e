"""What the tags of a TIFF say that Pillow passes over: each such layout is put right, or refused by name."""

import io
from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# Pillow's own reader of uncompressed files mixes up the planes of 16 bits; libtiff knows every layout.
TiffImagePlugin.READ_LIBTIFF = True

_SUBFILE, _OLD_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES = 254, 255, 258, 262, 277
_COMPRESSION, _PLANAR, _COLOURMAP, _INK_SET, _SAMPLE_FORMAT = 259, 284, 320, 332, 339
_MOST_PAGES = 100  # that are looked at: each may be as slow to read as the file is long
_WHITE_IS_ZERO = 0
_SEPARATE_PLANES = 2
_PHOTOMETRICS = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
_FORMATS = {1: "whole numbers", 2: "numbers with a sign", 3: "floating-point numbers", 5: "complex", 6: "complex"}


def describe_tiff(data: bytes) -> str:
    """The layout of a TIFF's first page, for people; "" if its tags cannot be read."""
    if data[:4] == b"MM\x00\x2b":
        return "BigTIFF, big-endian"
    try:
        tags = next(_pages(data))
        photometric = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO)
        parts = [
            f"{tags.get(_SAMPLES, 1)} x {max(tags.get(_BITS, (1,)))} bits",
            _FORMATS.get(max(tags.get(_SAMPLE_FORMAT, (1,))), "numbers of no known format"),
            _PHOTOMETRICS.get(photometric, f"photometric {photometric}"),
            f"compression {tags.get(_COMPRESSION, 1)}",
        ]
        if tags.get(_PLANAR) == _SEPARATE_PLANES:
            parts.append("planes")
    except Exception:  # of bytes that strangers made
        return ""
    return ", ".join(parts)


def tiff_problem(picture: TiffImagePlugin.TiffImageFile, data: bytes) -> str:
    """Why an opened TIFF would be decoded to something else than it shows, "" if it would not.

    Raises what Pillow raises for damaged tags.
    """
    tags = picture.tag_v2
    sample_format = max(tags.get(_SAMPLE_FORMAT, (1,)))
    if sample_format not in (1, 4):  # 4: undefined
        return f"has {_FORMATS.get(sample_format, 'pixels of no known format')}, whose white is anyone's guess"
    if tags.get(_PLANAR) == _SEPARATE_PLANES and picture.mode in ("LA", "La", "PA"):
        return "has its transparency in a plane of its own"
    if tags.get(_PLANAR) == _SEPARATE_PLANES and max(tags.get(_BITS, (1,))) > 8:
        return "has more than 8 bits in planes of their own"
    if picture.mode == "CMYK" and tags.get(_INK_SET, 1) != 1:
        return "has inks other than cyan, magenta, yellow and black"
    pages = list(islice(_pages(data), _MOST_PAGES))
    pictures = [page for page in pages if not _stands_beside(page)]
    if len(pictures) > 1:
        return f"has {len(pictures)} pages, and nothing says which is meant"
    if pictures and pages[0] is not pictures[0]:
        return "has a thumbnail on its first page"
    return ""


def _stands_beside(page: ImageFileDirectory_v2) -> bool:
    """Whether a page is a smaller copy of a picture, or its transparency."""
    return bool(page.get(_SUBFILE, 0) & 0b101) or page.get(_OLD_SUBFILE) == 2


def _pages(data: bytes) -> Iterator[ImageFileDirectory_v2]:
    head = data[:16] if data[2:3] == b"\x2b" else data[:8]
    place, seen, file = ImageFileDirectory_v2(head).next, set[int](), io.BytesIO(data)
    while place and place not in seen:
        seen.add(place)
        page = ImageFileDirectory_v2(head)
        file.seek(place)
        page.load(file)
        yield page
        place = page.next


def as_tiff_shows(picture: TiffImagePlugin.TiffImageFile) -> Image.Image:
    """A decoded TIFF with its palette, its alpha and its 16 bits of grey as its tags mean them."""
    tags = picture.tag_v2
    if picture.mode in ("P", "PA") and max(tags[_COLOURMAP]) < 256:
        # Some programs write levels of 8 bits where 16 belong: all would be black. libtiff sees it likewise.
        picture.putpalette(bytes(tags[_COLOURMAP]), "RGB;L")
    if picture.mode.startswith("I;16"):
        levels = np.asarray(picture).astype(np.uint16)
        levels <<= 16 - max(tags.get(_BITS, (16,)))
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            levels = ~levels
        upright = Image.fromarray(levels)
        upright.info = dict(picture.info)
        return upright
    return picture.convert("LA") if picture.mode == "La" else picture  # colours multiplied by their alpha
