"""Real photographs without a download, cut into the demo's 96 triples: target, source with an object in the hole, mask.

The photographs ship inside the scikit-image and scikit-learn wheels. Credits: NASA (astronaut), Stéfan van der Walt
(cat), Rachel Michetti (coffee), SpaceX (rocket), the Middlebury stereo benchmark (motorcycle), danielbuechele and
vultilion on Flickr, CC BY 2.0 (pagoda, flower).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from configs.errors import InputError

HOLE_FRACTION = (0.15, 0.50)  # share of the crop's area, lowest and highest

SQUARE, WIDE, TALL = (64, 64), (48, 80), (80, 48)  # height, width


@dataclass(frozen=True)
class Photograph:
    """One photograph, the size it is brought to, and how that canvas is cut."""

    package: str
    path: str
    caption: str
    width: int  # of the canvas: chosen so that a crop of 64 px holds recognisable structure
    bands: tuple[tuple[tuple[int, int], int], ...]  # top to bottom: (height, width) of a crop, crops in the band


# 53 square, 22 wide and 21 tall crops: every aspect bucket of the demo fills more than one global batch.
PHOTOGRAPHS = {
    "astronaut": Photograph(
        "skimage", "data/astronaut.png", "an astronaut in an orange suit", 256, ((SQUARE, 4), (SQUARE, 4), (TALL, 4))
    ),
    "cat": Photograph(
        "skimage", "data/chelsea.png", "a close-up of a tabby cat", 320, ((WIDE, 3), (SQUARE, 5), (WIDE, 3), (WIDE, 3))
    ),
    "coffee": Photograph(
        "skimage", "data/coffee.png", "a cup of coffee on a table", 320, ((SQUARE, 5), (SQUARE, 5), (WIDE, 4))
    ),
    "rocket": Photograph(
        "skimage", "data/rocket.jpg", "a rocket on its launch pad at dusk", 320, ((SQUARE, 4), (TALL, 5), (SQUARE, 5))
    ),
    "motorcycle": Photograph(
        "skimage",
        "data/motorcycle_left.png",
        "a red motorcycle in a garage",
        320,
        ((WIDE, 3), (WIDE, 3), (SQUARE, 5), (WIDE, 3)),
    ),
    "pagoda": Photograph(
        "sklearn",
        "datasets/images/china.jpg",
        "a pagoda above a lake",
        320,
        ((SQUARE, 4), (TALL, 6), (SQUARE, 4)),
    ),
    "flower": Photograph(
        "sklearn", "datasets/images/flower.jpg", "a dahlia in bloom", 320, ((SQUARE, 4), (TALL, 6), (SQUARE, 4))
    ),
}


@dataclass(frozen=True)
class Triple:
    """One training item of the demo. target, source: uint8 [H, W, 3]; mask: bool [H, W], True = hole."""

    name: str
    target: np.ndarray
    source: np.ndarray
    mask: np.ndarray
    caption: str


def load_photographs() -> dict[str, Image.Image]:
    """The demo's photographs by name, RGB, in their own size (300 to 512 px high). Nothing is downloaded.

    Raises InputError if a photograph's package is not installed.
    """
    photographs = {}
    for name, photograph in PHOTOGRAPHS.items():
        try:
            root = resources.files(photograph.package)
        except ModuleNotFoundError as error:
            raise InputError(
                f"The demo's photograph {name!r} ships inside the Python package {photograph.package!r}, which is not "
                "installed. Install the demo's packages: pip install scikit-image scikit-learn"
            ) from error
        with (root / photograph.path).open("rb") as file:
            photographs[name] = Image.open(file).convert("RGB")
    return photographs


def load_canvases() -> dict[str, np.ndarray]:
    """The photographs brought to the size the demo cuts them at: uint8 [H, W, 3], 320 px wide (astronaut 256)."""
    canvases = {}
    for name, picture in load_photographs().items():
        width = PHOTOGRAPHS[name].width
        height = round(picture.height * width / picture.width)
        canvases[name] = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
    return canvases


def plan_crops(name: str, canvas_height: int) -> list[tuple[int, int, int, int]]:
    """Disjoint boxes (top, left, height, width) of one photograph: its bands and their crops, spread evenly."""
    photograph = PHOTOGRAPHS[name]
    band_gap = (canvas_height - sum(height for (height, _), _ in photograph.bands)) / (len(photograph.bands) - 1)
    boxes = []
    top = 0.0
    for (height, width), count in photograph.bands:
        stride = (photograph.width - width) / (count - 1)
        boxes += [(int(top), int(index * stride), height, width) for index in range(count)]
        top += height + band_gap
    return boxes


def make_triples() -> Iterator[Triple]:
    """The demo's 96 triples in a fixed order; the same bytes every time. No two crops overlap or are equal."""
    for photograph_index, (name, canvas) in enumerate(load_canvases().items()):
        for index, (top, left, height, width) in enumerate(plan_crops(name, canvas.shape[0])):
            rng = np.random.default_rng([photograph_index, index])
            target = canvas[top : top + height, left : left + width]
            mask = draw_hole(rng, height, width)
            vertical = "upper" if 2 * top + height < canvas.shape[0] else "lower"
            horizontal = "left" if 2 * left + width < canvas.shape[1] else "right"
            caption = f"{PHOTOGRAPHS[name].caption}, {vertical} {horizontal} part"
            yield Triple(f"{name}-{index:02d}", target, put_object(rng, target, mask), mask, caption)


def draw_hole(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A union of brush strokes, boxes and ellipses: bool [height, width], True = hole, 15 to 50 % of the area."""
    lowest, highest = HOLE_FRACTION
    while True:
        wanted = rng.uniform(0.16, 0.34)
        hole = Image.new("L", (width, height))
        while np.asarray(hole).mean() / 255 < wanted:
            _draw_hole_part(rng, ImageDraw.Draw(hole), height, width)
        mask = np.asarray(hole) > 0
        if lowest <= mask.mean() <= highest:
            return mask


def _draw_hole_part(rng: np.random.Generator, draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    kind = rng.choice(["stroke", "box", "ellipse"])
    x, y = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
    if kind == "stroke":
        radius = rng.uniform(3, 6)
        angle = rng.uniform(0, 2 * np.pi)
        for _ in range(int(rng.integers(8, 24))):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
            angle += rng.uniform(-0.6, 0.6)
            x = float(np.clip(x + radius * np.cos(angle), 0, width))
            y = float(np.clip(y + radius * np.sin(angle), 0, height))
        return
    half_width, half_height = rng.uniform(0.1, 0.28) * width, rng.uniform(0.1, 0.28) * height
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    if kind == "box":
        draw.rectangle(box, fill=255)
    else:
        draw.ellipse(box, fill=255)


def put_object(rng: np.random.Generator, target: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The target with a coloured object standing wholly inside the hole, as a picture has before object removal.

    target: uint8 [H, W, 3]; mask: bool [H, W], True = hole. Returns uint8 [H, W, 3], equal to target outside the hole.
    """
    depth = _hole_depth(mask)
    center_y, center_x = rng.choice(np.argwhere(depth >= 0.75 * depth.max()))
    size = depth[center_y, center_x]  # every pixel nearer to the center than this is inside the hole
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] - np.array([center_y, center_x]).reshape(2, 1, 1)
    angle = rng.uniform(0, np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / size
    across = (y * np.cos(angle) - x * np.sin(angle)) / (size * rng.uniform(0.6, 1.0))
    if rng.random() < 0.5:
        shape = along**2 + across**2 < 1
    else:
        shape = np.maximum(np.abs(along), np.abs(across)) < 0.7  # its corners are 0.99 away
    color, second_color = rng.integers(0, 256, size=(2, 3))
    texture = rng.choice(["flat", "stripes", "checks", "dots"])
    if texture == "flat":
        pattern = np.zeros_like(mask)
    elif texture == "stripes":
        pattern = np.floor(along * 4) % 2 == 0
    elif texture == "checks":
        pattern = (np.floor(along * 3) + np.floor(across * 3)) % 2 == 0
    else:
        pattern = (along * 3 % 1 - 0.5) ** 2 + (across * 3 % 1 - 0.5) ** 2 < 0.1
    source = target.copy()
    source[shape] = np.where(pattern[..., None], second_color, color)[shape]
    return source


def _hole_depth(mask: np.ndarray) -> np.ndarray:
    """How many pixels inside the hole each pixel is, along rows, columns and diagonals: int [H, W], 0 outside."""
    depth = np.zeros(mask.shape, dtype=int)
    layer = Image.fromarray(mask.astype(np.uint8))
    while np.asarray(layer).any():
        depth += np.asarray(layer)
        layer = layer.filter(ImageFilter.MinFilter(3))  # at the picture's border the hole counts as going on
    return depth


def write_triples(folder: Path) -> None:
    """Write the 96 triples as folder/target, folder/source and folder/mask, one PNG each of the same name.

    A caption stands beside each target as <name>.txt. Masks are mode L, 0 or 255, white = hole. The folder appears
    whole or not at all; a complete one is left as it is.
    Raises InputError if the folder exists and holds anything else.
    """
    if folder.exists():
        if _is_complete(folder):
            return
        raise InputError(
            f"{folder}: exists, but does not hold the demo's triples. Remove it, or give a folder that does not exist."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for part in ("target", "source", "mask"):
            (unfinished / part).mkdir()
        for triple in make_triples():
            Image.fromarray(triple.target).save(unfinished / "target" / f"{triple.name}.png")
            Image.fromarray(triple.source).save(unfinished / "source" / f"{triple.name}.png")
            Image.fromarray(triple.mask.astype(np.uint8) * 255).save(unfinished / "mask" / f"{triple.name}.png")
            (unfinished / "target" / f"{triple.name}.txt").write_text(triple.caption + "\n", encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp's 0700 would lock out everyone else
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _is_complete(folder: Path) -> bool:
    names = [
        f"{name}-{index:02d}"
        for name, photograph in PHOTOGRAPHS.items()
        for index in range(sum(count for _, count in photograph.bands))
    ]
    expected = {f"{part}/{name}.png" for part in ("target", "source", "mask") for name in names}
    expected |= {f"target/{name}.txt" for name in names}
    return expected == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
