"""Old triples from photographs, saved as people save them, for tests that look at pixels."""

import numpy as np
from PIL import Image, ImageOps

from data.migrate.find import OldTriple
from data.sources.picture_file import PictureFile
from tests.data.sources.made_pairs import Pairs


def save_triples(folder, count, *, white_is_hole=True, cut=lambda number: True, size=(192, 144)):
    """`count` triples as JPEGs of any quality, the masks as JPEG or PNG.

    cut: of a number, whether the masked picture is the target with a hole of one colour, any; else it has a piece of
    another photograph in it.
    """
    pairs = Pairs()
    triples = []
    for number in range(count):
        generator = np.random.default_rng([7, number])
        target, masked, mask = pairs.make(number, size)
        if cut(number):
            colour = [(0, 0, 0), (255, 255, 255), (127, 127, 127), tuple(map(int, generator.integers(0, 256, 3)))]
            masked = Image.composite(Image.new("RGB", size, colour[number % 4]), target, mask)
        if not white_is_hole:
            mask = ImageOps.invert(mask)
        places = [folder / f"{number:03d}_{role}" for role in ("target.jpg", "mask.png", "masked.jpg")]
        if number % 3 == 0:
            places[1] = places[1].with_suffix(".jpg")
        for picture, place in zip((target, mask, masked), places, strict=True):
            picture.save(place, quality=int(generator.integers(60, 96)))
        triples.append(OldTriple(f"{number:03d}", *(PictureFile(str(place)) for place in places)))
    return triples
