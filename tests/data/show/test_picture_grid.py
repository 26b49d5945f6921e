import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from data.show.picture_grid import GridItem, save_grid, to_picture
from data.sources.problems import printable

COLUMNS = ("target", "hole", "filled", "mask")


def item(height: int, width: int, color=(0.9, 0.1, 0.2)) -> list[torch.Tensor]:
    picture = torch.tensor(color)[:, None, None].expand(3, height, width)
    return [picture, picture, picture, torch.ones(1, height, width)]


def grid_of(*lines, note="a note", text="") -> list[GridItem]:
    return [GridItem([line], [note], text) for line in lines]


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
    save_grid(tmp_path / "grid.png", COLUMNS, grid_of([pattern, *item(*size)[1:]]))
    red = places_of(Image.open(tmp_path / "grid.png"), (255, 0, 0))
    factor = 192 // max(size)
    # The first row and column lie under the picture's edge; inside, every red pixel is a square.
    inner = (size[0] // 2 - 1) * (size[1] // 2 - 1) * factor**2
    assert inner <= len(red) <= (size[0] // 2) * (size[1] // 2) * factor**2


def test_large_pictures_are_made_smaller(tmp_path):
    save_grid(tmp_path / "grid.png", COLUMNS, grid_of(item(600, 400)))
    sheet = Image.open(tmp_path / "grid.png")
    places = places_of(sheet, (230, 26, 51))
    assert np.ptp(places[:, 0]) + 1 == pytest.approx(192, abs=2)  # but for the edge
    assert sheet.width < 1000


@pytest.mark.parametrize("num_items, blocks", [(1, 1), (3, 1), (4, 2), (7, 2), (12, 2)])
def test_every_item_is_on_the_sheet(tmp_path, num_items, blocks):
    colors = [(0.02 * (number + 1), 0.5, 0.25) for number in range(num_items)]
    save_grid(tmp_path / "grid.png", COLUMNS, grid_of(*(item(32, 32, color) for color in colors)))
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
    save_grid(tmp_path / "grid.png", COLUMNS, grid_of(*rows))
    sheet = Image.open(tmp_path / "grid.png")
    for (height, width), color in zip(sizes, colors, strict=True):
        factor = 192 // max(height, width)
        found = places_of(sheet, tuple(round(255 * channel) for channel in color))
        assert len(found) == 3 * (height * factor - 2) * (width * factor - 2)


def test_a_long_note_is_cut_and_stays_on_its_item(tmp_path):
    for name, note in (("short", "a note"), ("long", "a very long note " * 40)):
        rest = grid_of(*[item(64, 64)] * 3, note="")
        save_grid(tmp_path / f"{name}.png", COLUMNS, [*grid_of(item(64, 64), note=note), *rest])
    short, long = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("short", "long"))
    changed = np.argwhere((short != long).any(axis=-1))
    assert len(changed)
    assert changed[:, 1].max() < short.shape[1] / 2  # the right half holds the other item


def sheet_of(path, text, count=8):
    save_grid(path, COLUMNS, grid_of(*[item(64, 64)] * count, text=text))
    return np.asarray(Image.open(path))


def test_a_text_takes_three_lines_at_most_and_no_more_work_the_longer_it_is(tmp_path, monkeypatch):
    heights = [
        sheet_of(tmp_path / "a.png", text, count=1).shape[0] for text in ("", "one", "some " * 40, "some " * 440)
    ]
    assert np.diff(heights).tolist() == [18, 18, 18]
    seen = []
    monkeypatch.setattr("data.show.picture_grid.printable", lambda text: seen.append(len(text)) or printable(text))

    def letters_seen(text):
        seen.clear()
        sheet_of(tmp_path / "a.png", text)
        return sum(seen)

    assert letters_seen("letter by letter " * 20_000) == letters_seen("letter by letter " * 200) > 0


@pytest.mark.parametrize(
    "text",
    ["two\nlines\r\n\tand a third", "\ud83d half a character", "\0\x1b[31m", "😀 a smile", "x" * 9999, "\n", "ﷺ" * 99],
)
def test_no_text_is_too_strange_to_be_written(tmp_path, text):
    assert (sheet_of(tmp_path / "a.png", text, count=1) == 32).any(), "nothing is written"


def test_a_text_in_letters_that_no_font_has_says_so_in_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr("data.show.picture_grid._fonts", lambda: (ImageFont.load_default(13),))
    chinese = sheet_of(tmp_path / "a.png", "一只橙色的猫", count=1)
    said = "(6 letters that no font of this machine has: --out x.html shows them)"
    np.testing.assert_array_equal(chinese, sheet_of(tmp_path / "b.png", said, count=1))
    np.testing.assert_array_equal(
        *(sheet_of(tmp_path / "a.png", text, 1) for text in ("a 猫 sat on a mat", "a ? sat on a mat"))
    )


def test_an_item_may_have_several_lines_of_pictures_with_gaps(tmp_path):
    first, second = item(32, 32, (0.2, 0.4, 0.6)), item(32, 32, (0.6, 0.4, 0.2))
    save_grid(tmp_path / "a.png", COLUMNS, [GridItem([first, [None, *second[1:]]], ["one", "two"])])
    sheet = Image.open(tmp_path / "a.png")
    assert len(places_of(sheet, (51, 102, 153))) == 3 * 190**2
    below = places_of(sheet, (153, 102, 51))
    assert len(below) == 2 * 190**2 and below[:, 1].min() > 16 + 192
