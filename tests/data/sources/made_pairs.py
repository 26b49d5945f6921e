"""Pairs of source and target with their mask, cut from photographs."""

import io
from functools import cache

import numpy as np
from PIL import Image

from data.sources.picture_file import PictureBytes
from demo.photographs import draw_hole, load_photographs

SIZE = (192, 144)


class Pairs:
    """Pairs by number, the same every time."""

    def __init__(self):
        # without their profiles, which Pillow hands on to some formats alone
        self._photographs = [Image.fromarray(np.asarray(picture)) for picture in load_photographs().values()]

    def make(self, number, size=SIZE):
        """target, source (a piece of another photograph in the hole, which stands out from what is behind), mask."""
        generator = np.random.default_rng(number)
        target, other = (self._cut(generator, size) for _ in range(2))
        width, height = size
        hole = draw_hole(generator, height // 2, width // 2)
        mask = Image.fromarray(hole.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        before, after = (np.asarray(picture).astype(int) for picture in (other, target))
        unlike = np.where(np.abs(before - after) < 40, after + np.where(after < 128, 50, -50), before).astype(np.uint8)
        return target, Image.composite(Image.fromarray(unlike), target, mask), mask

    def _cut(self, generator, size):
        photograph = self._scaled(int(generator.integers(len(self._photographs))), size)
        left, top = (
            int(generator.integers(side - wanted + 1)) for side, wanted in zip(photograph.size, size, strict=True)
        )
        return photograph.crop((left, top, left + size[0], top + size[1]))

    @cache  # noqa: B019
    def _scaled(self, index, size):
        photograph = self._photographs[index]
        scale = max(wanted / side for wanted, side in zip(size, photograph.size, strict=True)) * 1.4
        return photograph.resize(tuple(round(side * scale) for side in photograph.size), Image.Resampling.LANCZOS)


def saved(picture, kind="JPEG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return PictureBytes(file.getvalue(), f"picture.{kind.lower()}")


def moved(mask, right, down):
    found = Image.new("L", mask.size)
    found.paste(mask, (right, down))
    return found
