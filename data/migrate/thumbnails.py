"""Thumbnails of a triple for a page: its old pictures, the hole as FLUX.1 Fill sees it, and the hole on the target."""

import base64
import io
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageChops, ImageFilter

from configs.errors import InputError
from data.migrate.holes import load_hole, load_opaque
from data.migrate.report import MigratedTriple
from data.sources.picture_file import PictureFile
from data.sources.pictures import load_picture

_SIDE = 256  # px, of the longest side: twice what a page shows, for screens of two pixels a point
_ENLARGED = 128  # px: a picture with no more is enlarged by the page, and its pixels are squares then
_GREY = (128, 128, 128)  # what a hole is in the masked picture: 0 in [-1, 1]
_TINT = (236, 20, 212)  # of the hole on the target: a colour that photographs have not


class Thumbnail(NamedTuple):
    """A picture of a page. title: which of a triple's.  uri: its data, "" where there is none.  note: why not.
    enlarged: whether it is so small that the page shows it larger."""

    title: str
    uri: str
    note: str = ""
    enlarged: bool = False


def draw_triple(triple: MigratedTriple, *, max_megapixels: float) -> list[Thumbnail]:
    """Target, masked picture where it is kept or may be to blame, mask, the hole as Fill sees it, and on the target.
    What cannot be drawn is empty, with the reason."""

    def load(place: str, read: Callable[..., Image.Image] = load_picture) -> _Drawn:
        try:
            return read(PictureFile(place), max_megapixels=max_megapixels)
        except InputError:
            return "cannot be read"  # why is said beside it, as what is wrong with the triple

    target = load(triple.target, load_opaque if triple.opaque_target else load_picture)
    drawn = [_thumbnail("target", load(triple.target) if triple.opaque_target else target)]
    masked = load(triple.masked) if triple.masked and (triple.keeps_source or triple.problems) else None
    if masked is not None:
        drawn.append(_thumbnail("source, kept" if triple.keeps_source else "masked picture", masked))
    if triple.mask:
        drawn.append(_thumbnail("mask", load(triple.mask), lossless=True))
    try:
        hole = load_hole(triple, max_megapixels=max_megapixels)
    except InputError:
        hole = None
    if hole is None:
        return [*drawn, Thumbnail("hole", "", "drawn at random while training" if triple.kept else "not known")]
    seen = masked if triple.keeps_source and masked is not None else target
    drawn.append(_thumbnail("as Fill sees it", _over(seen, hole, _paint_grey)))
    return [*drawn, _thumbnail("hole on target", _over(target, hole, _tint))]


_Drawn = Image.Image | str  # a picture, or why there is none


def _over(picture: _Drawn, hole: Image.Image, draw: Callable[[Image.Image, Image.Image], Image.Image]) -> _Drawn:
    """A picture at the size of a thumbnail, with its hole drawn on it."""
    if isinstance(picture, str):
        return picture
    if picture.size != hole.size:
        return f"the mask is {hole.width}x{hole.height}, the picture {picture.width}x{picture.height}"
    small = _small(picture)
    return draw(small, hole.resize(small.size, Image.Resampling.BOX).point(lambda level: 255 * (level >= 128)))


def _paint_grey(picture: Image.Image, hole: Image.Image) -> Image.Image:
    return Image.composite(Image.new("RGB", picture.size, _GREY), picture, hole)


def _tint(picture: Image.Image, hole: Image.Image) -> Image.Image:
    tinted = Image.composite(Image.blend(picture, Image.new("RGB", picture.size, _TINT), 0.45), picture, hole)
    edge = ImageChops.difference(hole, hole.filter(ImageFilter.MinFilter(3)))
    return Image.composite(Image.new("RGB", picture.size, _TINT), tinted, edge)


def _small(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    return small


def _thumbnail(title: str, drawn: _Drawn, *, lossless: bool = False) -> Thumbnail:
    if isinstance(drawn, str):
        return Thumbnail(title, "", drawn)
    small, buffer = _small(drawn), io.BytesIO()
    small.save(buffer, format="WEBP", quality=70, lossless=lossless)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(title, uri, enlarged=max(small.size) <= _ENLARGED)
