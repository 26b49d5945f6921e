"""TIFFs of every layout, held against tifffile and the format's own definition: right, or refused by name."""

import re
from itertools import product

import numpy as np
import pytest
import tifffile

from configs.errors import InputError
from data.sources.pictures import load_mask, load_picture, picture_size
from tests.picture_files import tiff, tiff_tags

HEIGHT, WIDTH = 21, 34
ORDERS = ["<", ">"]


def scene(channels):
    """[H, W, channels] in 0..1, without repetition."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    parts = [columns / WIDTH, rows / HEIGHT, (rows + columns) / (HEIGHT + WIDTH), np.full((HEIGHT, WIDTH), 0.6)]
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (HEIGHT, WIDTH, channels))
    return np.clip(np.stack(parts[:channels], axis=-1) + noise, 0, 1)


def load(path, data=None):
    """data: what to write there first."""
    if data is not None:
        path.write_bytes(data)
    return np.asarray(load_picture(path, max_megapixels=1)).astype(float)


def load_or_refusal(path):
    """Its pixels, or why there are none."""
    try:
        return load(path)
    except InputError as error:
        return str(error)


def grey(values):
    return np.broadcast_to(values, (*values.shape[:-1], 3))


# --- what tifffile writes ---------------------------------------------------------------------------------------------

COLOURS = {"minisblack": 1, "miniswhite": 1, "rgb": 3, "separated": 4}
LAYOUTS = list(product(["contig", "separate"], [None, (16, 16)], [None, "lzw", "zlib", "packbits"]))


def shown(values, photometric, alpha):
    """Levels of samples in 0..1, by the definition of TIFF."""
    colours, opaque = values[..., : COLOURS[photometric]], values[..., -1:]
    if photometric == "miniswhite":
        colours = 1 - colours
    colours = (1 - colours[..., :3]) * (1 - colours[..., 3:]) if photometric == "separated" else grey(colours)
    if alpha == "unassalpha":
        colours = colours * opaque + 1 - opaque
    elif alpha == "assocalpha":
        colours = colours + 1 - opaque
    return 255 * colours


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "photometric, alpha",
    [
        *((photometric, None) for photometric in COLOURS),
        *product(["minisblack", "rgb"], ["unassalpha", "assocalpha", "unspecified"]),
    ],
)
def test_samples_are_what_they_say_in_every_layout(tmp_path, order, bits, photometric, alpha):
    values = scene(COLOURS[photometric])
    if alpha is not None:
        opaque = np.tile(np.linspace(0.1, 1, WIDTH), (HEIGHT, 1))[..., None]
        values = np.concatenate([values * opaque if alpha == "assocalpha" else values, opaque], axis=-1)
    channels = values.shape[-1]
    stored = np.rint(values * (2**bits - 1)).astype(f"u{bits // 8}")
    expected = shown(stored / (2**bits - 1), photometric, alpha)
    options = {"photometric": photometric, "byteorder": order, "metadata": None}
    options |= {"extrasamples": [alpha]} if alpha else {}
    path = tmp_path / "a.tif"
    read = 0
    for planes, tile, compression in LAYOUTS:
        layout = {"tile": tile, "compression": compression} | ({} if tile else {"rowsperstrip": 8})
        if channels > 1:
            layout |= {"planarconfig": planes}
        written = np.moveaxis(stored, -1, 0) if planes == "separate" and channels > 1 else stored.squeeze()
        tifffile.imwrite(path, written, **options, **layout)
        np.testing.assert_array_equal(tifffile.imread(path), written)
        loaded = load_or_refusal(path)
        if isinstance(loaded, str):
            assert re.search(r"in (a plane of its|planes of their) own|a layout that is not read \(", loaded)
            assert loaded.endswith("Save it as PNG of 8 bits.")
        else:
            assert abs(loaded - expected).max() <= 1 + 1e-9, layout
            read += 1
    unknown = bits == 16 and (channels == 2 or (photometric == "miniswhite" and order == ">"))
    assert read == 0 if unknown else read >= len(LAYOUTS) // 2, "layouts that are read"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "u4", "u8", "f2", "f4", "f8"])
@pytest.mark.parametrize("channels", [1, 3])
def test_numbers_whose_white_nobody_knows_are_refused(tmp_path, order, kind, channels):
    top = 1 if kind[0] == "f" else 100
    samples = (scene(channels) * top).astype(kind).squeeze()
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric=photometric, byteorder=order, metadata=None)
    for read in (picture_size, load_picture, load_mask):
        with pytest.raises(InputError, match=r"a\.tif: .* Save it as PNG of 8 bits"):
            read(tmp_path / "a.tif", max_megapixels=1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("compression", [None, "lzw"])
def test_a_palette_has_levels_of_16_bits_or_of_8(tmp_path, order, wide, tile, compression):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (3, 256))
    indexes = rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    palette = (levels * 257 if wide else levels).astype(np.uint16)
    options = {"photometric": "palette", "colormap": palette, "byteorder": order, "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", indexes, tile=tile, compression=compression, **options)
    np.testing.assert_array_equal(load(tmp_path / "a.tif"), np.moveaxis(levels, 0, -1)[indexes])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_jpeg_inside_a_tiff_is_what_tifffile_decodes(tmp_path, order, photometric, tile):
    levels = np.rint(255 * scene(3)).astype(np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, levels, photometric=photometric, compression="jpeg", byteorder=order, tile=tile)
    assert abs(load(path) - tifffile.imread(path)).max() <= 3  # two decoders' chroma and cosines


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_of_few_bits_spans_black_to_white_or_is_refused(tmp_path, bits, photometric):
    top = 2**bits - 1
    stored = np.rint(scene(1)[..., 0] * top).astype(np.uint16 if bits > 8 else np.uint8)
    written = stored.astype(bool) if bits == 1 else stored
    tifffile.imwrite(tmp_path / "a.tif", written, photometric=photometric, bitspersample=bits, metadata=None)
    loaded = load_or_refusal(tmp_path / "a.tif")
    if (bits, photometric) == (12, "miniswhite"):
        assert "not read (1 x 12 bits, whole numbers, white is zero, compression 1)" in str(loaded)
    else:
        expected = (stored if photometric == "minisblack" else top - stored) / top
        assert abs(loaded - 255 * expected[..., None]).max() <= 1


@pytest.mark.parametrize("order", ORDERS)
def test_pages_are_refused_and_a_thumbnail_beside_the_picture_is_not(tmp_path, order):
    levels = np.rint(255 * scene(3)).astype(np.uint8)
    path = tmp_path / "a.tif"
    for kind in (0, 2):  # 2: said to be pages of one document
        tifffile.imwrite(path, np.stack([levels, levels]), photometric="rgb", byteorder=order, subfiletype=kind)
        with pytest.raises(InputError, match=r"a\.tif: has 2 pages, and nothing says which is meant"):
            picture_size(path, max_megapixels=1)
    with tifffile.TiffWriter(path, byteorder=order) as file:
        file.write(levels, photometric="rgb")
        file.write(levels[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(load(path), levels)
    with tifffile.TiffWriter(path, byteorder=order) as file:
        file.write(levels[::2, ::2], photometric="rgb", subfiletype=1)
        file.write(levels, photometric="rgb")
    with pytest.raises(InputError, match=r"a\.tif: has a thumbnail on its first page"):
        picture_size(path, max_megapixels=1)
    tifffile.imwrite(path, levels, photometric="rgb", byteorder=order, subfiletype=1)  # and nothing else
    np.testing.assert_array_equal(load(path), levels)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of tags it reads in the wrong place
def test_a_large_tiff_is_read_or_named(tmp_path):
    levels = np.rint(255 * scene(3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="rgb", bigtiff=True, byteorder="<")
    np.testing.assert_array_equal(load(tmp_path / "a.tif"), levels)
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="rgb", bigtiff=True, byteorder=">")
    with pytest.raises(InputError, match=r"not read \(BigTIFF, big-endian\)"):
        load(tmp_path / "a.tif")


# --- what only the format's definition has ----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sampling", [[1, 1], [2, 2], None])
def test_ycbcr_without_compression(tmp_path, order, sampling):
    height, width = 8, 12
    rows, columns = np.mgrid[0:height, 0:width]
    luma, blue, red = 40 + columns * 15, 60 + rows // 2 * 24, 90 + columns // 2 * 16
    pixels = np.stack([luma, blue, red], axis=-1)
    if sampling == [1, 1]:
        data = pixels.astype(np.uint8).tobytes()
    else:  # two by two: four of luma, then what they share
        blocks = pixels.reshape(height // 2, 2, width // 2, 2, 3).swapaxes(1, 2)
        four = blocks[..., 0].reshape(height // 2, width // 2, 4)
        data = np.concatenate([four, blocks[:, :, 0, 0, 1:]], axis=-1).astype(np.uint8).tobytes()
    tags = tiff_tags(width, height, samples=3, photometric=6) | ({530: (3, sampling)} if sampling else {})
    blue, red = blue - 128, red - 128
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1)
    assert abs(load(tmp_path / "a.tif", tiff(tags, data, order)) - np.clip(rgb, 0, 255)).max() <= 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits, channels", [(8, 1), (8, 3), (16, 1)])
def test_bits_from_the_last_to_the_first(tmp_path, order, bits, channels):
    stored = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH, channels))
    data = np.frombuffer(stored.astype(f"{order}u{bits // 8}").tobytes(), np.uint8)
    turned = np.packbits(np.unpackbits(data, bitorder="little")).tobytes()
    photometric = 2 if channels == 3 else 1
    tags = tiff_tags(WIDTH, HEIGHT, samples=channels, bits=bits, photometric=photometric) | {266: (3, [2])}
    (tmp_path / "a.tif").write_bytes(tiff(tags, turned, order))
    loaded = load_or_refusal(tmp_path / "a.tif")
    if (bits, order) == (16, ">"):
        assert "not read (1 x 16 bits" in str(loaded)
    else:
        assert abs(loaded - grey(255 * stored / (2**bits - 1))).max() <= 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits, channels", [(8, 3), (16, 3), (16, 1)])
@pytest.mark.parametrize("orientation, turn", [(3, 2), (6, -1), (8, 1)])
def test_a_tiff_stands_upright(tmp_path, order, bits, channels, orientation, turn):
    stored = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH, channels))
    photometric = 2 if channels == 3 else 1
    tags = tiff_tags(WIDTH, HEIGHT, samples=channels, bits=bits, photometric=photometric) | {274: (3, [orientation])}
    pixels = load(tmp_path / "a.tif", tiff(tags, stored.astype(f"{order}u{bits // 8}").tobytes(), order))
    assert abs(pixels - grey(np.rot90(255 * stored / (2**bits - 1), turn))).max() <= 1


@pytest.mark.parametrize(
    "tags, problem",
    [
        (tiff_tags(4, 4, samples=4, photometric=5) | {332: (3, [2])}, "inks other than cyan, magenta, yellow and"),
        (tiff_tags(4, 4, samples=3, photometric=9), r"not read \(3 x 8 bits, whole numbers, photometric 9"),
        (tiff_tags(4, 4, samples=3, bits=4, photometric=2), r"not read \(3 x 4 bits, whole numbers, RGB"),
        (tiff_tags(4, 4, photometric=3), r"not read \(1 x 8 bits, whole numbers, palette"),
        (tiff_tags(4, 4, photometric=4), r"not read \(1 x 8 bits, whole numbers, photometric 4"),
    ],
)
def test_a_layout_that_is_not_read_is_named(tmp_path, tags, problem):
    (tmp_path / "a.tif").write_bytes(tiff(tags, bytes(64)))
    with pytest.raises(InputError, match=rf"a\.tif: .*{problem}.* Save it as PNG of 8 bits"):
        picture_size(tmp_path / "a.tif", max_megapixels=1)


def test_a_mask_of_16_bits_whose_white_is_zero_is_not_turned_over(tmp_path):
    stored = np.zeros((4, 4), np.uint16)
    stored[:2] = 65535
    (tmp_path / "a.tif").write_bytes(tiff(tiff_tags(4, 4, bits=16, photometric=0), stored.tobytes()))
    mask = np.asarray(load_mask(tmp_path / "a.tif", max_megapixels=1))
    assert mask[:2].max() == 0 and mask[2:].min() == 255
