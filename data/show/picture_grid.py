"""A sheet of pictures for people: an item's pictures in lines, a column for each stage, with notes and text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.sources.problems import printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_MARGIN = 16
_GAP = 6  # between the stages of an item
_GUTTER = 28  # between items that stand side by side
_TITLE = 26  # height of the line of titles
_LINE, _BELOW = 18, 14  # height of a line of text; room under an item
_MOST_LETTERS = 1024  # of a text that are looked at: three lines of the narrowest
_TEXT_LINES = 3  # that are shown of an item's text
_BACKGROUND, _INK, _DIM, _EDGE = (255, 255, 255), (32, 32, 32), (96, 96, 96), (208, 208, 208)

# For letters that Pillow's own font has not, the first of these that is installed and has them.
_OTHER_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "uming.ttc"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simsun.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf"),
)
_MISSING = "\uffff"  # a character that no font has


@dataclass(frozen=True)
class GridItem:
    """An item of a sheet.

    lines: its pictures, a line of stages each, None = nothing there; fp32 [3, H, W] or [1, H, W] in [0, 1], one size.
    notes: one under each line, cut to the item's width.  text: under all, at most three lines of it.
    """

    lines: Sequence[Sequence[Tensor | None]]
    notes: Sequence[str]
    text: str = ""


def to_picture(tensor: Tensor) -> Image.Image:
    """fp32 [3, H, W] or [1, H, W] in [0, 1] -> RGB picture."""
    pixels = tensor.detach().clamp(0, 1).mul(255).round().byte().cpu().expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_grid(path: Path, columns: Sequence[str], items: Sequence[GridItem], *, cell: int = 192) -> None:
    """Write a PNG of items, titled by stage; of four or more each stands in the shorter of two blocks.

    cell: longest side of a picture on the sheet, in pixels.
    """
    width = len(columns) * (cell + _GAP) - _GAP
    bottoms = [_MARGIN + _TITLE] * (2 if len(items) >= 4 else 1)  # of each block
    places = []
    for item in items:
        picture, block = _draw_item(item, width, cell), bottoms.index(min(bottoms))
        places.append((picture, (_MARGIN + block * (width + _GUTTER), bottoms[block])))
        bottoms[block] += picture.height
    size = (2 * _MARGIN + len(bottoms) * (width + _GUTTER) - _GUTTER, max(bottoms) + _MARGIN - _BELOW)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for block in range(len(bottoms)):
        for number, title in enumerate(columns):
            left = _MARGIN + block * (width + _GUTTER) + number * (cell + _GAP)
            draw.text((left + cell / 2, _MARGIN), title, fill=_INK, font=font, anchor="mt")
    for picture, corner in places:
        sheet.paste(picture, corner)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _draw_item(item: GridItem, width: int, cell: int) -> Image.Image:
    lines = [[None if tensor is None else _fit(to_picture(tensor), cell) for tensor in line] for line in item.lines]
    heights = [max(picture.height for picture in line if picture is not None) for line in lines]
    words, font = _readable(item.text)
    text = _wrap(words, font, width)
    size = (width, sum(height + 5 + _LINE for height in heights) + _LINE * len(text) + _BELOW)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw, top = ImageDraw.Draw(sheet), 0
    for line, height, note in zip(lines, heights, item.notes, strict=True):
        for number, picture in enumerate(line):
            if picture is not None:
                corner = (number * (cell + _GAP) + (cell - picture.width) // 2, top)
                sheet.paste(picture, corner)
                # A black mask or a white sky would else have no edge.
                box = (*corner, corner[0] + picture.width - 1, corner[1] + picture.height - 1)
                draw.rectangle(box, outline=_EDGE)
        words, note_font = _readable(note)
        left = next(number for number, picture in enumerate(line) if picture is not None) * (cell + _GAP)
        draw.text((left, top + height + 5), _shorten(words, note_font, width - left), fill=_INK, font=note_font)
        top += height + 5 + _LINE
    for number, words in enumerate(text):
        draw.text((0, top + number * _LINE), words, fill=_DIM, font=font)
    return sheet


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """A picture made smaller, or enlarged by an integer factor: then every pixel is a square, without interpolation."""
    longest = max(picture.size)
    if longest <= cell:
        factor = cell // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * cell / longest)), max(1, round(picture.height * cell / longest)))
    return picture.resize(size, Image.Resampling.LANCZOS)


# --- text -------------------------------------------------------------------------------------------------------------


def _readable(text: str) -> tuple[str, Font]:
    """A text on one line, as much of it as could ever be shown, and the font that has most of its letters."""
    text = printable(" ".join(text[:_MOST_LETTERS].split()))
    lacking = [(_lacking_letters(text, font), font) for font in _fonts()]
    letters, font = min(lacking, key=lambda entry: len(entry[0]))
    if 4 * sum(letter in letters for letter in text) > len(text):
        return f"({len(text)} letters that no font of this machine has: --out x.html shows them)", font
    return "".join("?" if letter in letters else letter for letter in text), font


@cache
def _fonts() -> tuple[Font, ...]:
    found: list[Font] = [ImageFont.load_default(13)]
    for name in _OTHER_FONTS:
        try:
            found.append(ImageFont.truetype(name, 13))
        except OSError:
            continue  # not installed
    return tuple(found)


def _lacking_letters(text: str, font: Font) -> set[str]:
    """The letters that a font would draw as an empty box."""
    return {letter for letter in set(text) if not letter.isascii() and _is_lacking(letter, font)}


@cache
def _is_lacking(letter: str, font: Font) -> bool:
    return bytes(font.getmask(letter)) == bytes(font.getmask(_MISSING))


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """The first lines of a text, broken at spaces where there are some; dots at the end if there is more."""
    lines: list[str] = []
    while text:
        count = _num_fitting(text, font, width)
        if count == len(text) or len(lines) == _TEXT_LINES - 1:
            return [*lines, _shorten(text, font, width)]
        space = text.rfind(" ", count // 2, count + 1)
        count = space if space > 0 else max(count, 1)
        lines.append(text[:count])
        text = text[count:].lstrip()
    return lines


def _shorten(text: str, font: Font, width: int) -> str:
    """A text, its end replaced by dots if it is wider than `width` pixels."""
    if (count := _num_fitting(text, font, width)) == len(text):
        return text
    return f"{text[: _num_fitting(text[:count], font, width - font.getlength('…'))].rstrip()}…"


def _num_fitting(text: str, font: Font, width: float) -> int:
    """How many of the first letters fit into `width` pixels, by the width of each alone: no more are looked at."""
    widths = accumulate(_width_of(letter, font) for letter in text)
    return next((count for count, total in enumerate(widths) if total > width), len(text))


@cache
def _width_of(letter: str, font: Font) -> float:
    return font.getlength(letter)
