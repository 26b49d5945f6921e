"""Whether a source shows what its target shows: told by their edges, in tiles, whatever their light and colours."""

import numpy as np
from PIL import Image

from data.sources.mask_fit import MaskFit

TURNED_SOURCE, ANOTHER = "turned source", "another picture"

_TILES, _TILE_CELLS = 6, 10  # on each side: of the picture, of a tile
_CELLS = _TILES * _TILE_CELLS + 1  # one more than steps between neighbours
_FEWEST_CELLS = 30  # of a preview's side: below, a tile has too few steps to tell
_ALIKE = 0.5  # correlation of a tile's steps: relit, noisy or blurred by a sixtieth 0.6 to 1, of others about 0 +- 0.1
_FLAT = 1.0  # grey levels of a tile's steps: less is noise
_EQUAL = 4.0  # grey levels of the mean difference of tiles that are equal, though flat
_MOST_BY_CHANCE = 2  # tiles of two pictures of different things that are alike
_UNLIKE = 0.1  # mean correlation of the tiles outside the mask: of noisy ones 0.2 at the least, of others below 0.1
_FARTHEST = 2  # cells by which tiles are moved, 3 % of the side: cameras held by hand, another crop
_ALIKE_NEARBY = 0.35  # mean of the tiles' best correlation there, of either sign: of others 0.34 at most
_FEWEST_TURNED = 5  # tiles that fit when turned, for each one that fits as it is
_FEWEST_UNLIKE = 9  # tiles with edges outside the mask: pictures with fewer are not judged


def find_other_scene(target: np.ndarray, source: np.ndarray, mask: np.ndarray) -> MaskFit | None:
    """What is wrong with a source of which no part is where the target has it, or None. All uint8 [h, w] of one size:
    the pictures grey, the mask 255 in the hole.

    Tiles inside the mask count as likeness too, so a mask that is inverted or lies elsewhere makes no picture another.
    """
    if min(target.shape) < _FEWEST_CELLS:
        return None
    is_square = target.shape[0] == target.shape[1]
    before, after, hole = (_grid(picture) for picture in (source, target, mask))
    correlation = _correlate(after, before)
    alike = int(np.count_nonzero(correlation >= _ALIKE))
    turned = {
        how: int(np.count_nonzero(_correlate(after, other) >= _ALIKE))
        for how, other in _turns(before, is_square=is_square).items()
    }
    best = max(turned, key=lambda how: turned[how])
    if turned[best] >= _FEWEST_TURNED * max(1, alike) and not _shows_the_same(after, before):
        what = f"the source fits its target only when it is {best}: EXIF turns one of the two, or was lost on the way"
        return MaskFit(TURNED_SOURCE, what)
    equal = _tiles(np.abs(after - before)[1:, 1:]).mean(axis=1) <= _EQUAL
    seen = correlation[~np.isnan(correlation)]
    seen_outside = correlation[~np.isnan(correlation) & (_tiles(hole[1:, 1:]).mean(axis=1) < 128)]
    if (
        alike + np.count_nonzero(equal) <= _MOST_BY_CHANCE
        and seen_outside.size >= _FEWEST_UNLIKE
        and max(seen.mean(), seen_outside.mean()) < _UNLIKE
        and not _shows_the_same(after, before)
    ):
        return MaskFit(ANOTHER, "the source shows another picture than its target: outside the mask, too, nothing fits")
    return None


def _shows_the_same(target: np.ndarray, source: np.ndarray) -> bool:
    """Whether the edges of two grids are in the same places after all: only that those of one rise where the other's
    fall, as in negatives, or lie a little elsewhere."""
    moves = range(-_FARTHEST, _FARTHEST + 1)
    moved = [np.roll(source, (down, right), (0, 1)) for down in moves for right in moves]
    nearby = np.fmax.reduce([np.abs(_correlate(target, grid)) for grid in moved])
    seen = nearby[~np.isnan(nearby)]
    return bool(seen.size and seen.mean() > _ALIKE_NEARBY)


def _grid(picture: np.ndarray) -> np.ndarray:
    """float32 [_CELLS, _CELLS], whatever the aspect."""
    return np.asarray(Image.fromarray(picture).resize((_CELLS, _CELLS), Image.Resampling.BOX)).astype(np.float32)


def _tiles(values: np.ndarray) -> np.ndarray:
    """[..., 60, 60] -> [36, values of a tile]."""
    tiles = values.reshape(-1, _TILES, _TILE_CELLS, _TILES, _TILE_CELLS)
    return tiles.transpose(1, 3, 0, 2, 4).reshape(_TILES**2, -1)


def _steps(grid: np.ndarray) -> np.ndarray:
    """The differences of neighbours, down and to the right, by tile: [36, 200]."""
    return _tiles(np.stack([np.diff(grid, axis=0)[:, 1:], np.diff(grid, axis=1)[1:]]))


def _correlate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The correlation of two grids' edges by tile, [36]; nan where one of them is flat."""
    steps = _steps(first), _steps(second)
    heights = [np.sqrt((of_one**2).mean(axis=1)) for of_one in steps]
    has_edges = np.minimum(*heights) >= _FLAT
    return np.divide(
        (steps[0] * steps[1]).mean(axis=1),
        heights[0] * heights[1],
        where=has_edges,
        out=np.full(len(has_edges), np.nan),
    )


def _turns(grid: np.ndarray, *, is_square: bool) -> dict[str, np.ndarray]:
    """A grid as EXIF could have turned it, by how. Quarter turns only of square pictures: others change their size."""
    turns = {
        "mirrored": grid[:, ::-1],
        "mirrored top to bottom": grid[::-1],
        "turned by 180 degrees": grid[::-1, ::-1],
    }
    if is_square:
        turns |= {
            "turned by 90 degrees to the left": np.rot90(grid),
            "turned by 90 degrees to the right": np.rot90(grid, -1),
            "mirrored and turned by 90 degrees": grid.T,
            "turned by 90 degrees and mirrored": np.rot90(grid, 2).T,
        }
    return turns
