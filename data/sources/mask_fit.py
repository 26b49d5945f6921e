"""Whether a mask lies where source and target differ: found from their pixels, at a reduced size.

Of a pair the hole is known without its mask: it is where the two pictures differ by more than compression does. So a
mask that is inverted or lies elsewhere shows, and so do a source that is the target, and one in the target's place.
Most pairs are right and seen to be so on small grey pictures (`looks_right`); only those that are not are compared in
colour (`compare`).
"""

from typing import NamedTuple

import numpy as np

SAME, INVERTED, ELSEWHERE, SWAPPED = "same", "inverted", "elsewhere", "swapped"

_CELLS = 256  # cells on the long side of what is compared in colour
_CHANGED = 12.0  # grey levels of a cell's mean: more than compression changes
_SAME = 4.0  # grey levels of the mean of 8x8 pixels: what compression alone may change
_UNTOUCHED = 5  # of 255: a cell with less of the hole has none of it
_LEAST_OUTSIDE = 0.005  # share of what differs that may lie outside: rounding, and compression around the hole
_LEFT_OUTSIDE = 0.35  # share of that which a shift may leave outside and still explain it
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_STEP_IN_SOURCE = 0.1  # share of the difference: less is no step


_Window = tuple[slice, slice]
_ALL = slice(None)
_NEIGHBOURS: list[tuple[_Window, _Window]] = [
    ((slice(1, None), _ALL), (slice(None, -1), _ALL)),
    ((slice(None, -1), _ALL), (slice(1, None), _ALL)),
    ((_ALL, slice(1, None)), (_ALL, slice(None, -1))),
    ((_ALL, slice(None, -1)), (_ALL, slice(1, None))),
]  # every cell and the one above, below, to the left and to the right


class MaskFit(NamedTuple):
    """What is wrong between a mask and its pictures. kind: of the words above.  what: the sentence's end."""

    kind: str
    what: str


def preview_cell(width: int, height: int) -> int:
    """Side of the cells, in pixels, that `looks_right` compares: 8 from 1024 pixels on, where a JPEG is decoded at an
    eighth; as small as 1 for small pictures."""
    cell, longest = 1, max(width, height)
    while longest >= 128 * cell and (cell < 8 or longest > 512 * cell):
        cell *= 2
    return cell


def fine_cell(width: int, height: int) -> int:
    """Side of the cells, in pixels, that `compare` is given."""
    longest = max(width, height)
    cell = 1 if longest < 128 else 2
    while longest >= 1.5 * _CELLS * cell:
        cell *= 2
    return cell


def looks_right(target: np.ndarray, source: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a pair differs within its mask and nowhere else, and the object is in the source. Cells, uint8 [h, w],
    grey; the mask's are 255 where all of the cell is hole."""
    difference = np.abs(target.astype(np.int16) - source)
    changed = difference > _CHANGED
    total = int(np.count_nonzero(changed))
    outside = int(np.count_nonzero(changed & (mask < _UNTOUCHED)))
    much = max(4.0, 0.1 * int(np.count_nonzero(mask >= _UNTOUCHED)))  # a few edges differ by how they are reduced
    fits = total >= much and outside <= _LEAST_OUTSIDE * total
    return fits and not stands_in_target(target, source, changed)


def compare(target: np.ndarray, source: np.ndarray, mask: np.ndarray, cell: int) -> MaskFit | None:
    """What is wrong with a pair and its mask, or None. target, source: cells, uint8 [h, w, 3]; mask: [h, w], as above.
    cell: its side in pixels of the whole pictures, by which shifts are told."""
    colours = target.astype(np.float32) - source
    if is_same(colours, cell):
        return MaskFit(SAME, "source and target are the same picture")
    grey = np.abs(colours @ _GREY)
    changed = changed_cells(grey)
    if not changed.any():
        changed = changed_cells(np.abs(colours).max(axis=2))  # of the same brightness all over
    covered = mask >= _UNTOUCHED
    inside, outside = np.count_nonzero(changed & covered), np.count_nonzero(changed & ~covered)
    total = inside + outside
    if total == 0:
        return None
    if outside > _LEAST_OUTSIDE * total and outside > 2:
        return _explain(grey, changed, mask, cell)
    if stands_in_target(target @ _GREY, source @ _GREY, changed):
        return MaskFit(SWAPPED, "source and target look swapped: what stands out at the hole's edge is in the target")
    return None


def stands_in_target(target: np.ndarray, source: np.ndarray, changed: np.ndarray) -> bool:
    """Whether something stands in the target on what the source shows, both grey: then they are swapped.

    At the edge of what differs the picture with the object has a step as high as the difference, and the one without
    goes on as if nothing was there. Only said where it is plain: the difference has one sign along the edge (that of
    texture has both) and is well above noise, and the source is no smoother there than around (else it is blurred, or
    painted over).
    """
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    if not rows.size:
        return False
    window = np.s_[max(0, rows[0] - 3) : rows[-1] + 4, max(0, columns[0] - 3) : columns[-1] + 4]
    target, source, changed = target[window].astype(np.float32), source[window].astype(np.float32), changed[window]
    region = share_around(changed, 5) > 0.3  # without the gaps where the two agree by chance
    steps = squares = total = heights = 0.0
    count = 0
    for here, there in _NEIGHBOURS:
        edge = region[here] & ~region[there]
        height = (source - target)[here][edge]
        steps += float(((source[here] - source[there])[edge] * height).sum())
        squares += float((height * height).sum())
        heights += float(np.abs(height).sum())
        total += float(height.sum())
        count += height.size
    plain = count >= 12 and squares >= 2 * _CHANGED * heights and abs(total) >= 0.6 * heights
    if not plain or steps > _STEP_IN_SOURCE * squares:
        return False
    slope = np.abs(np.diff(source, axis=0, append=source[-1:])) + np.abs(np.diff(source, axis=1, append=source[:, -1:]))
    inside, outside = slope[region & changed], slope[~region]
    return bool(outside.size and inside.mean() >= 0.5 * outside.mean())


def is_same(colours: np.ndarray, cell: int) -> bool:
    """Whether signed differences of colour are all such as compression makes: it keeps the means of 8x8 pixels, and
    of 16x16 for what is not brightness."""
    grey = colours @ _GREY
    return _largest_mean(grey, max(1, 8 // cell)) <= _SAME and all(
        _largest_mean(colours[..., channel] - grey, max(1, 16 // cell)) <= 2 * _SAME for channel in range(3)
    )


def _largest_mean(values: np.ndarray, size: int) -> float:
    """The largest absolute mean of whole size x size blocks."""
    height, width = max(size, values.shape[0] // size * size), max(size, values.shape[1] // size * size)
    values = values[:height, :width]
    if min(values.shape) < size:
        return float(np.abs(values).mean())
    return float(np.abs(values.reshape(height // size, size, width // size, size).mean(axis=(1, 3))).max())


def changed_cells(difference: np.ndarray) -> np.ndarray:
    """Which cells, with their neighbours, differ by more than the noise that the quietest fifth of the picture has."""
    candidates = difference > max(_CHANGED, 14 * float(np.quantile(difference, 0.2)))
    if candidates.any():
        candidates = difference > max(_CHANGED, 0.25 * float(np.median(difference[candidates])))
    return candidates & (share_around(candidates, 3) > 0.4)


def share_around(flags: np.ndarray, size: int) -> np.ndarray:
    """Share of the size x size cells around each that are set; past the border the outermost ones count again."""
    height, width = flags.shape
    padded = np.pad(flags, size // 2, mode="edge").astype(np.uint8)  # sums are below 256
    rows = np.add.reduce([padded[start : start + height] for start in range(size)], dtype=np.uint8)
    return np.add.reduce([rows[:, start : start + width] for start in range(size)], dtype=np.uint8) / size**2


def _explain(grey: np.ndarray, changed: np.ndarray, mask: np.ndarray, cell: int) -> MaskFit | None:
    """Why so much of what differs lies outside the mask; None if it may be the object's shadow."""
    covered, black = mask >= _UNTOUCHED, mask < 255 - _UNTOUCHED
    outside = np.count_nonzero(changed & ~covered) / np.count_nonzero(changed)
    is_missed = bool(outside > 0.9 and _share(changed, covered) < 0.1)
    rows, columns, overlap = _best_shift(changed, covered)
    if is_missed:
        inverted = np.count_nonzero(changed & black) / np.count_nonzero(changed | black)
        if np.count_nonzero(covered) > 0.5 * covered.size or inverted >= overlap:
            return MaskFit(INVERTED, "the mask is inverted: source and target differ only where it is black")
    said = f"the mask lies elsewhere: {outside:.0%} of what differs between source and target is outside it"
    far = np.hypot(rows, columns)
    if far >= 1.5 and far * cell >= 4 and _is_explained(grey, changed, covered, (rows, columns), is_missed=is_missed):
        return MaskFit(ELSEWHERE, f"{said}; moved by about {_shift_in_words(rows * cell, columns * cell)} it would fit")
    if outside > 0.5 and _share(changed, covered) < _share(changed, ~covered):
        return MaskFit(ELSEWHERE, f"{said}, and no shift makes it fit")
    return None


def _is_explained(
    grey: np.ndarray, changed: np.ndarray, covered: np.ndarray, shift: tuple[int, int], *, is_missed: bool
) -> bool:
    """Whether what differs outside a mask is the object that it should cover, and not its shadow: then the mask, moved,
    is filled by what differs (as loose ones are not, unless they missed it), and what it covers newly differs as much
    as all that does, and what it bares does not."""
    moved = _moved(covered, *shift)
    fresh = moved & ~covered
    bared = covered & ~moved & _moved(np.ones_like(covered), *shift)  # but for what would come from past the border
    filled = _share(changed, moved)
    return bool(
        (filled >= 0.35 or is_missed)
        and np.count_nonzero(changed & fresh) > max(2, _LEAST_OUTSIDE * np.count_nonzero(changed))
        and _share(changed, fresh) >= 0.45 * filled
        and _share(changed, bared) <= 0.3 * filled
        and np.median(grey[changed & ~covered]) >= 0.5 * np.median(grey[changed])
    )


def _share(changed: np.ndarray, region: np.ndarray) -> float:
    return int(np.count_nonzero(changed & region)) / max(1, int(np.count_nonzero(region)))


def _best_shift(changed: np.ndarray, covered: np.ndarray) -> tuple[int, int, float]:
    """(rows, columns) by which the mask would have to be moved to fit best, and its overlap with what differs over
    their union, but for what would come from past the border."""
    size = (2 * changed.shape[0], 2 * changed.shape[1])

    def correlate(fixed: np.ndarray, shifted: np.ndarray) -> np.ndarray:
        """Their common cells by shift."""
        spectra = (np.fft.rfft2(flags.astype(np.float32), size) for flags in (fixed, shifted))
        return np.rint(np.fft.irfft2(next(spectra) * np.conj(next(spectra)), size))

    everywhere = np.ones_like(changed)
    overlap = correlate(changed, covered)
    union = correlate(changed, everywhere) + correlate(everywhere, covered) - overlap
    rows = np.fft.fftfreq(size[0], 1 / size[0]).round().astype(int)[:, None]
    columns = np.fft.fftfreq(size[1], 1 / size[1]).round().astype(int)[None, :]
    # A mask moved out of the picture would fit what little it covers then.
    enough = overlap >= 0.5 * min(np.count_nonzero(changed), np.count_nonzero(covered))
    score = np.where(enough, overlap / np.maximum(union, 1) - 1e-3 * np.hypot(rows, columns), -1)
    best = np.unravel_index(int(score.argmax()), score.shape)
    return int(rows[best[0], 0]), int(columns[0, best[1]]), max(0.0, float(score[best]))


def _moved(region: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A region moved down and to the right; what leaves the picture is lost."""
    height, width = region.shape
    moved = np.zeros_like(region)
    moved[max(0, rows) : height + min(0, rows), max(0, columns) : width + min(0, columns)] = region[
        max(0, -rows) : height - max(0, rows), max(0, -columns) : width - max(0, columns)
    ]
    return moved


def _shift_in_words(down: int, right: int) -> str:
    parts = [f"{abs(right)} px to the {'right' if right > 0 else 'left'}"] if right else []
    parts += [f"{abs(down)} px {'down' if down > 0 else 'up'}"] if down else []
    return " and ".join(parts) or "0 px"
