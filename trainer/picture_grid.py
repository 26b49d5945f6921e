"""Pictures for people: one row per item, one column per stage."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP, _TITLE = 6, 22
_BACKGROUND, _INK, _DIM = (250, 250, 250), (30, 30, 30), (110, 110, 110)


def to_picture(tensor: Tensor) -> Image.Image:
    """fp32 [3, H, W] or [1, H, W] in [0, 1] -> RGB picture."""
    pixels = tensor.detach().clamp(0, 1).mul(255).round().byte().cpu().expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_grid(
    path: Path, columns: Sequence[str], rows: Sequence[Sequence[Tensor]], notes: Sequence[str], *, cell: int = 192
) -> None:
    """Write a PNG: titled columns, one row of pictures per item with a note under it.

    rows: pictures of one row share a size.  cell: longest side of a picture in the grid, in pixels.
    """
    pictures = [[_fit(to_picture(tensor), cell) for tensor in row] for row in rows]
    heights = [max(picture.height for picture in row) + _GAP + _TITLE for row in pictures]
    grid = Image.new("RGB", (_GAP + len(columns) * (cell + _GAP), _GAP + _TITLE + sum(heights)), _BACKGROUND)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for number, title in enumerate(columns):
        draw.text((_GAP + number * (cell + _GAP), _GAP), title, fill=_INK, font=font)
    top = _GAP + _TITLE
    for row, note, height in zip(pictures, notes, heights, strict=True):
        for number, picture in enumerate(row):
            grid.paste(picture, (_GAP + number * (cell + _GAP), top))
        draw.text((_GAP, top + height - _GAP - _TITLE + 3), note, fill=_DIM, font=font)
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Enlarged pictures keep their pixels: what a demo's 64 px hold should be seen, not smoothed.
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
