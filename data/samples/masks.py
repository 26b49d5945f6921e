"""Masks: random holes (brush strokes, boxes, polygons, borders) for pictures that come without; a user's own, dilated.

A mask is a function of (content of the picture, variant): the order of the pictures, the worker and the batch change
nothing. Shapes are drawn in a unit of their own, so a picture has the same hole at 512 and at 1024 pixels.

    python -m data.samples.masks OUT.png          a sheet of examples
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from configs.dataset_schema import RandomMasks
from configs.mask_recipe import MaskRecipe

_Draw = Callable[[float, float, np.random.Generator, "_Area"], "_Shapes"]
_Area = (
    tuple[float, float] | None
)  # least and most share of the picture that a hole inside it covers; None: as its kind


def mask_generator(content: str, variant: int) -> np.random.Generator:
    """The random numbers of one mask. content: the target's hash, 32 hex digits; all of it is the key."""
    key = int(content, 16)
    return np.random.Generator(np.random.Philox(key=[key >> 64, key & (1 << 64) - 1], counter=[0, 0, 0, variant]))


def draw_masks(recipe: MaskRecipe, content: str, height: int, width: int) -> list[np.ndarray]:
    """A picture's masks, bool [H, W], True = paint: one per variant, each of a kind chosen by the recipe's shares."""
    kinds, shares = zip(*recipe.shares, strict=True)
    ends = np.cumsum(shares)
    masks = []
    for variant in range(recipe.variants):
        generator = mask_generator(content, variant)
        kind = kinds[int(np.searchsorted(ends, generator.random() * ends[-1], side="right"))]
        masks.append(draw_mask(kind, height, width, generator, recipe.area))
    return masks


def dilate_masks(mask: np.ndarray, recipe: MaskRecipe, content: str) -> list[np.ndarray]:
    """A picture's own mask, bool [H, W], once per variant, grown to all sides by pixels drawn from the recipe's range.

    Where it would cover the whole picture, they are halved until something is left to keep.
    """
    low, high = recipe.dilate
    masks = []
    for variant in range(recipe.variants):
        radius = int(mask_generator(content, variant).integers(low, high, endpoint=True))
        while (grown := _grow(mask, radius)).all():
            radius //= 2
        masks.append(grown)
    return masks


def _grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask dilated by a disc, computed around the hole alone: over all of a picture it takes tenths of a second."""
    if radius == 0:
        return mask
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = (
        slice(max(0, rows[0] - radius), rows[-1] + radius + 1),
        slice(max(0, columns[0] - radius), columns[-1] + radius + 1),
    )
    from skimage.morphology import isotropic_dilation  # half a second, and most datasets grow no masks

    grown = np.zeros_like(mask)
    grown[window] = isotropic_dilation(mask[window], radius)
    return grown


# --- kinds: each draws in a picture of `width` x `height` units whose area is 1 ---------------------------------------


@dataclass(frozen=True)
class _Shapes:
    """discs: (x, y, radius).  polygons: corners (x, y).  outside: the hole is all but these."""

    discs: tuple[tuple[float, float, float], ...] = ()
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()
    outside: bool = False


def draw_mask(kind: str, height: int, width: int, generator: np.random.Generator, area: _Area = None) -> np.ndarray:
    """bool [H, W], True = paint, of one of KINDS. The share of the area that is painted:

    brush, box, polygon: 8 to 55 %, or about what `area` says, log-uniform; half_plane, outpaint: 12 to 65 %; full: all
    of it.
    """
    side = (height * width) ** 0.5
    return _rasterize(_DRAW[kind](height / side, width / side, generator, area), height, width)


def _rasterize(shapes: _Shapes, height: int, width: int) -> np.ndarray:
    scale = (height * width) ** 0.5
    picture = Image.new("L", (width, height), int(shapes.outside))
    draw, inside = ImageDraw.Draw(picture), int(not shapes.outside)
    for x, y, radius in shapes.discs:
        box = [(x - radius) * scale - 0.5, (y - radius) * scale - 0.5]
        draw.ellipse([*box, box[0] + 2 * radius * scale, box[1] + 2 * radius * scale], fill=inside)
    for polygon in shapes.polygons:
        draw.polygon([(x * scale - 0.5, y * scale - 0.5) for x, y in polygon], fill=inside)
    return np.asarray(picture).astype(bool)


def _draw_share(generator: np.random.Generator, low: float, high: float, area: _Area) -> float:
    """Share of the picture that a hole is to cover: evenly between two ends, or log-uniform between those of `area`."""
    if area is None:
        return generator.uniform(low, high)
    return float(np.exp(generator.uniform(*np.log(area))))


def _draw_brush(height: float, width: float, generator: np.random.Generator, area: _Area) -> _Shapes:
    """Curved strokes of a round brush, one after the other until their share of the area is met; that is even between
    12 and 48 %, where a fixed number of strokes would crowd around its mean."""
    wanted = _draw_share(generator, 0.12, 0.48, area)
    thin = 1.0 if area is None else min(1.0, (wanted / 0.12) ** 0.5)  # small holes are of a small brush
    grain = (
        128 / thin
    )  # pixels per unit of the raster on which the share is counted: coarse, and the same for all sizes
    every = 8 if area is None else 1  # discs between two counts
    coarse = Image.new("L", (round(width * grain), round(height * grain)))
    draw = ImageDraw.Draw(coarse)
    discs: list[tuple[float, float, float]] = []
    while True:
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        radius, angle, bend = thin * generator.uniform(0.025, 0.07), generator.uniform(0, 2 * np.pi), 0.0
        for _ in range(int(generator.integers(20, 90))):
            discs.append((x, y, radius))
            draw.ellipse([(x - radius) * grain, (y - radius) * grain, (x + radius) * grain, (y + radius) * grain], 1)
            bend = 0.85 * bend + generator.normal(0, 0.09)
            angle += bend
            radius = float(np.clip(radius * np.exp(generator.normal(0, 0.05)), 0.02 * thin, 0.08 * thin))
            x, y = x + 0.4 * radius * np.cos(angle), y + 0.4 * radius * np.sin(angle)
            if not (0 <= x <= width and 0 <= y <= height):
                angle += np.pi / 2  # turn back at the edge
                x, y = float(np.clip(x, 0, width)), float(np.clip(y, 0, height))
            if len(discs) % every == 0 and np.asarray(coarse).mean() >= wanted:
                return _Shapes(discs=tuple(discs))


def _draw_box(height: float, width: float, generator: np.random.Generator, area: _Area) -> _Shapes:
    """One to three upright boxes."""
    count = int(generator.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
    covered = _draw_share(generator, 0.1, 0.5, area)
    boxes = []
    for share in generator.dirichlet([4.0] * count) if count > 1 else [1.0]:
        aspect = np.exp(generator.uniform(-0.8, 0.8))
        box_width = min((covered * share * aspect) ** 0.5, 0.92 * width)
        box_height = min(covered * share / box_width, 0.92 * height)
        left, top = generator.uniform(0, width - box_width), generator.uniform(0, height - box_height)
        boxes.append(_box(left, top, left + box_width, top + box_height))
    return _Shapes(polygons=tuple(boxes))


def _box(left: float, top: float, right: float, bottom: float) -> tuple[tuple[float, float], ...]:
    return (left, top), (right, top), (right, bottom), (left, bottom)


def _draw_polygon(height: float, width: float, generator: np.random.Generator, area: _Area) -> _Shapes:
    """One star-shaped polygon of 4 to 10 corners, wholly in the picture."""
    count = int(generator.integers(4, 11))
    angles = (np.arange(count) + generator.uniform(-0.35, 0.35, count)) * 2 * np.pi / count
    radii = generator.uniform(0.45, 1.0, count)
    x, y = radii * np.cos(angles), radii * np.sin(angles)
    unscaled = 0.5 * abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))  # the shoelace formula
    scale = (_draw_share(generator, 0.1, 0.5, area) / unscaled) ** 0.5
    scale = min(scale, 0.98 * width / np.ptp(x), 0.98 * height / np.ptp(y))
    x, y = (x - x.min()) * scale, (y - y.min()) * scale
    x, y = x + generator.uniform(0, width - x.max()), y + generator.uniform(0, height - y.max())
    return _Shapes(polygons=(tuple(zip(x.tolist(), y.tolist(), strict=True)),))


def _draw_half_plane(height: float, width: float, generator: np.random.Generator, area: _Area) -> _Shapes:
    """All to one side of a straight line of any direction."""
    angle, share = generator.uniform(0, 2 * np.pi), generator.uniform(0.15, 0.6)
    normal = np.array([np.cos(angle), np.sin(angle)])
    x, y = np.meshgrid((np.arange(64) + 0.5) / 64 * width, (np.arange(64) + 0.5) / 64 * height)
    edge = float(np.quantile(x * normal[0] + y * normal[1], share))
    along, far = np.array([-normal[1], normal[0]]), 4.0  # more than any diagonal
    corners = [edge * normal + far * along, edge * normal - far * along]
    corners += [corners[1] - far * normal, corners[0] - far * normal]
    return _Shapes(polygons=(tuple((float(x), float(y)) for x, y in corners),))


def _draw_outpaint(height: float, width: float, generator: np.random.Generator, area: _Area) -> _Shapes:
    """A border on one, two, three or four sides, as when a picture is continued past its edges."""
    kept = 1 - generator.uniform(0.15, 0.6)
    across = generator.choice([1.0, 0.0, 0.5], p=[0.35, 0.35, 0.3])  # of the loss, how much is in the width
    exponent = float(generator.uniform(0.3, 0.7)) if across == 0.5 else float(across)
    kept_width, kept_height = width * kept**exponent, height * kept ** (1 - exponent)
    left, top = (
        (whole - part) * float(generator.choice([0.0, 1.0, generator.uniform(0.2, 0.8)]))
        for whole, part in ((width, kept_width), (height, kept_height))
    )
    margin = 1.0  # what reaches the picture's edge goes past it, so that rounding leaves no line there
    return _Shapes(
        polygons=(
            _box(
                left if left > 1e-9 else -margin,
                top if top > 1e-9 else -margin,
                left + kept_width if left + kept_width < width - 1e-9 else width + margin,
                top + kept_height if top + kept_height < height - 1e-9 else height + margin,
            ),
        ),
        outside=True,
    )


def _draw_full(height: float, width: float, generator: np.random.Generator, area: _Area) -> _Shapes:
    """The whole picture."""
    return _Shapes(outside=True)


def drawers_of(section: type[RandomMasks], drawers: Mapping[str, _Draw]) -> Mapping[str, _Draw]:
    """`drawers`, one for each kind that a config may name. Raises TypeError if there is none for one of them."""
    if missing := section.model_fields.keys() - drawers.keys():
        raise TypeError(f"{', '.join(sorted(missing))}: a config may ask for such masks, but nothing here draws them.")
    return drawers


# At import, so that a kind without a drawer ends no run that has begun.
_DRAW = drawers_of(
    RandomMasks,
    {
        "brush": _draw_brush,
        "box": _draw_box,
        "polygon": _draw_polygon,
        "half_plane": _draw_half_plane,
        "outpaint": _draw_outpaint,
        "full": _draw_full,
    },
)
KINDS = tuple(_DRAW)


def contact_sheet(*, columns: int = 8) -> Image.Image:
    """Examples of every random kind, one a row, wide, square and tall in turn; each with its share of the area."""
    sizes, kinds = [(96, 96), (80, 112), (112, 80)], [kind for kind in KINDS if kind != "full"]
    label, cell, gap = 84, 112, 8
    sheet = Image.new("RGB", (label + columns * (cell + gap), len(kinds) * (cell + gap + 12) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, kind in enumerate(kinds):
        top = gap + row * (cell + gap + 12)
        draw.text((gap, top + cell // 2 - 6), kind, fill="black")
        for column in range(columns):
            height, width = sizes[column % len(sizes)]
            mask = draw_mask(kind, height, width, mask_generator(f"{row:032x}", column))
            picture = Image.fromarray(np.where(mask, 255, 64).astype(np.uint8))
            left = label + column * (cell + gap) + (cell - width) // 2
            sheet.paste(picture, (left, top + (cell - height) // 2))
            draw.rectangle(
                [left - 1, top + (cell - height) // 2 - 1, left + width, top + (cell + height) // 2], None, 0
            )
            draw.text((label + column * (cell + gap) + cell // 2 - 8, top + cell), f"{mask.mean():.0%}", fill="black")
    return sheet


if __name__ == "__main__":
    contact_sheet().quantize(16).save(sys.argv[1], optimize=True)
