"""A grid of pictures: a row for each item, a column for each stage, a note under each row."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 16
_GAP = 6  # between the stages of an item
_GUTTER = 28  # between items that stand side by side
_TITLE = 26  # height of the line of titles
_NOTE = 28  # height of the line under an item
_BACKGROUND, _INK, _DIM, _EDGE = (255, 255, 255), (32, 32, 32), (96, 96, 96), (208, 208, 208)


def to_picture(tensor: Tensor) -> Image.Image:
    """fp32 [3, H, W] or [1, H, W] in [0, 1] -> RGB picture."""
    pixels = tensor.detach().clamp(0, 1).mul(255).round().byte().cpu().expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_grid(
    path: Path, columns: Sequence[str], rows: Sequence[Sequence[Tensor]], notes: Sequence[str], *, cell: int = 192
) -> None:
    """Write a PNG: one row of pictures per item, titled by stage, with a note under it; four items or more stand in two
    blocks side by side.

    rows: pictures of one item share a size.  notes: one line each, cut to the item's width.  cell: longest side of a
    picture on the sheet, in pixels.
    """
    pictures = [[_fit(to_picture(tensor), cell) for tensor in row] for row in rows]
    titles, text = ImageFont.load_default(15), ImageFont.load_default(13)
    abreast = 2 if len(rows) >= 4 else 1
    item_width = len(columns) * (cell + _GAP) - _GAP
    lines = [range(first, min(first + abreast, len(rows))) for first in range(0, len(rows), abreast)]
    heights = [max(pictures[item][0].height for item in line) for line in lines]
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN + abreast * (item_width + _GUTTER) - _GUTTER,
            2 * _MARGIN + _TITLE + sum(height + _NOTE for height in heights) - (_NOTE - 20),
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(sheet)
    for block in range(abreast):
        for number, title in enumerate(columns):
            left = _MARGIN + block * (item_width + _GUTTER) + number * (cell + _GAP)
            draw.text((left + cell / 2, _MARGIN), title, fill=_INK, font=titles, anchor="mt")
    top = _MARGIN + _TITLE
    for line, height in zip(lines, heights, strict=True):
        for block, item in enumerate(line):
            start = _MARGIN + block * (item_width + _GUTTER)
            for number, picture in enumerate(pictures[item]):
                corner = (start + number * (cell + _GAP) + (cell - picture.width) // 2, top)
                sheet.paste(picture, corner)
                # A black mask or a white sky would else have no edge.
                box = (*corner, corner[0] + picture.width - 1, corner[1] + picture.height - 1)
                draw.rectangle(box, outline=_EDGE)
            note = _shorten(notes[item], text, item_width)
            draw.text((start, top + pictures[item][0].height + 5), note, fill=_DIM, font=text)
        top += height + _NOTE
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """A picture made smaller, or enlarged by an integer factor: then every pixel is a square, without interpolation."""
    longest = max(picture.size)
    if longest <= cell:
        factor = cell // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * cell / longest)), max(1, round(picture.height * cell / longest)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _shorten(note: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The note, its end replaced by dots if it is wider than `width` pixels."""
    if font.getlength(note) <= width:
        return note
    while note and font.getlength(f"{note}…") > width:
        note = note[:-1]
    return f"{note.rstrip()}…"
