import numpy as np
import pytest
import torch
from PIL import Image

from data.show.picture_grid import save_grid, to_picture

COLUMNS = ("target", "hole", "filled", "mask")


def item(height: int, width: int, color=(0.9, 0.1, 0.2)) -> list[torch.Tensor]:
    picture = torch.tensor(color)[:, None, None].expand(3, height, width)
    return [picture, picture, picture, torch.ones(1, height, width)]


def places_of(sheet: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    return np.argwhere((np.asarray(sheet) == color).all(axis=-1))


def test_a_tensor_becomes_its_picture():
    tensor = torch.tensor([[[0.0, 1.0], [0.5, 2.0]], [[0.25, 1.0], [0.5, -1.0]], [[0.75, 1.0], [0.5, 0.0]]])
    pixels = np.asarray(to_picture(tensor))
    assert pixels.tolist() == [[[0, 64, 191], [255, 255, 255]], [[128, 128, 128], [255, 0, 0]]]
    assert np.asarray(to_picture(torch.tensor([[[0.0, 1.0]]]))).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_tiny_pictures_are_enlarged_by_a_whole_number(tmp_path, size):
    pattern = torch.zeros(3, *size)
    pattern[0, ::2, ::2] = 1
    save_grid(tmp_path / "grid.png", COLUMNS, [[pattern, *item(*size)[1:]]], ["a note"])
    red = places_of(Image.open(tmp_path / "grid.png"), (255, 0, 0))
    factor = 192 // max(size)
    # The first row and column lie under the picture's edge; inside, every red pixel is a square.
    inner = (size[0] // 2 - 1) * (size[1] // 2 - 1) * factor**2
    assert inner <= len(red) <= (size[0] // 2) * (size[1] // 2) * factor**2


def test_large_pictures_are_made_smaller(tmp_path):
    save_grid(tmp_path / "grid.png", COLUMNS, [item(600, 400)], ["a note"])
    sheet = Image.open(tmp_path / "grid.png")
    places = places_of(sheet, (230, 26, 51))
    assert np.ptp(places[:, 0]) + 1 == pytest.approx(192, abs=2)  # but for the edge
    assert sheet.width < 1000


@pytest.mark.parametrize("num_items, blocks", [(1, 1), (3, 1), (4, 2), (7, 2), (12, 2)])
def test_every_item_is_on_the_sheet(tmp_path, num_items, blocks):
    colors = [(0.02 * (number + 1), 0.5, 0.25) for number in range(num_items)]
    save_grid(tmp_path / "grid.png", COLUMNS, [item(32, 32, color) for color in colors], ["note"] * num_items)
    sheet = Image.open(tmp_path / "grid.png")
    tops = {}
    for number, color in enumerate(colors):
        places = places_of(sheet, tuple(round(255 * channel) for channel in color))
        assert len(places) == 3 * 190**2  # three stages, each without its edge of one pixel
        tops[number] = tuple(places.min(axis=0))
    assert len(set(tops.values())) == num_items
    assert len({left for _, left in tops.values()}) == min(blocks, num_items)


def test_items_of_different_sizes_do_not_overlap(tmp_path):
    sizes, colors = [(64, 64), (32, 64), (64, 32), (16, 64)], [(0.2, 0.4, c / 10) for c in range(4)]
    rows = [item(*size, color) for size, color in zip(sizes, colors, strict=True)]
    save_grid(tmp_path / "grid.png", COLUMNS, rows, ["note"] * 4)
    sheet = Image.open(tmp_path / "grid.png")
    for (height, width), color in zip(sizes, colors, strict=True):
        factor = 192 // max(height, width)
        found = places_of(sheet, tuple(round(255 * channel) for channel in color))
        assert len(found) == 3 * (height * factor - 2) * (width * factor - 2)


def test_a_long_note_is_cut_and_stays_on_its_item(tmp_path):
    for name, note in (("short", "a note"), ("long", "a very long note " * 40)):
        save_grid(tmp_path / f"{name}.png", COLUMNS, [item(64, 64)] * 4, [note, "", "", ""])
    short, long = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("short", "long"))
    changed = np.argwhere((short != long).any(axis=-1))
    assert len(changed)
    assert changed[:, 1].max() < short.shape[1] / 2  # the right half holds the other item
