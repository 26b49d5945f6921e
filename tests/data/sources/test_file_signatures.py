"""Files that are not read are named, and colours that nobody could show."""

import io

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from data.sources.pictures import load_picture, picture_size
from tests.picture_files import D65, P3_PRIMARIES, RGB, png, png_chunk, png_profile, rgb_profile

LEVELS = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)


def refusal(path, data):
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        picture_size(path, max_megapixels=1)
    return str(caught.value)


def saved_as(kind):
    file = io.BytesIO()
    Image.fromarray(LEVELS).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "data, name",
    [
        (saved_as("JPEG2000"), "JPEG 2000"),
        (imagecodecs.jpeg2k_encode(LEVELS, codecformat="j2k"), "JPEG 2000"),
        (imagecodecs.jpegxl_encode(LEVELS), "JPEG XL"),
        (imagecodecs.jpegxl_encode(LEVELS, usecontainer=True), "JPEG XL"),
        (imagecodecs.jpeg8_encode(LEVELS.astype(np.uint16) * 16, bitspersample=12), "JPEG, damaged or of 12"),
        (saved_as("TGA"), "TGA"),
        (saved_as("DDS"), "DDS"),
        (saved_as("PPM"), "PPM"),
        (imagecodecs.qoi_encode(LEVELS), "QOI"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), "HEIC"),
        (b"8BPS\0\1" + bytes(90), "Photoshop document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    ],
)
def test_a_format_that_is_not_read_is_named_with_its_cure(tmp_path, data, name):
    message = refusal(tmp_path / "a.png", data)
    assert f"a.png: not a readable picture (kind: {name}" in message
    assert "Convert it to PNG" in message


@pytest.mark.parametrize(
    "primaries, curve, name",
    [(12, 13, "Display P3, curve 13"), (9, 16, "BT.2020, PQ"), (9, 18, "BT.2020, HLG"), (1, 8, "primaries 1, linear")],
)
def test_numbers_for_colours_other_than_srgbs_are_refused_without_a_profile(tmp_path, primaries, curve, name):
    said = png_chunk(b"cICP", bytes([primaries, curve, 0, 1]))
    avif = imagecodecs.avif_encode(LEVELS, 100, primaries=primaries, transfer=curve, matrix=1)
    for data in (png(LEVELS, RGB, 8, chunks=[said]), avif):
        assert f"has colours other than sRGB ({name}), and no profile" in refusal(tmp_path / "a.png", data)
    profile = png_profile(rgb_profile(P3_PRIMARIES, D65, "sRGB"))
    (tmp_path / "a.png").write_bytes(png(LEVELS, RGB, 8, chunks=[said, profile]))
    load_picture(tmp_path / "a.png", max_megapixels=1)


@pytest.mark.parametrize("primaries, curve", [(1, 13), (2, 2), (1, 1), (6, 6)])
def test_numbers_for_srgb_change_nothing(tmp_path, primaries, curve):
    said = png_chunk(b"cICP", bytes([primaries, curve, 0, 1]))
    for data in (
        png(LEVELS, RGB, 8, chunks=[said]),
        imagecodecs.avif_encode(LEVELS, 100, primaries=primaries, transfer=curve, matrix=0),
    ):
        (tmp_path / "a").write_bytes(data)
        np.testing.assert_array_equal(np.asarray(load_picture(tmp_path / "a", max_megapixels=1)), LEVELS)
