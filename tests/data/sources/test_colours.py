"""Colours under a profile, held against the formulas of colour spaces rather than another colour engine."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.sources.colours import to_srgb
from data.sources.pictures import load_picture
from tests.picture_files import (
    ADOBE_PRIMARIES,
    D50,
    D50_XYZ,
    D65,
    GREY,
    GREY_ALPHA,
    INKS,
    P3_PRIMARIES,
    PALETTE,
    PROPHOTO_PRIMARIES,
    RGB,
    RGBA,
    SRGB_PRIMARIES,
    cmyk_profile,
    grey_profile,
    lab_to_xyz,
    png,
    png_chunk,
    png_profile,
    rgb_profile,
    tiff,
    tiff_tags,
    to_srgb_levels,
    to_xyz,
)

SPACES = {
    "Display P3": (P3_PRIMARIES, D65, "sRGB"),
    "Adobe RGB": (ADOBE_PRIMARIES, D65, 2.19921875),
    "ProPhoto RGB": (PROPHOTO_PRIMARIES, D50, 1.8),
    "linear sRGB": (SRGB_PRIMARIES, D65, 1.0),
}
HEIGHT, WIDTH = 24, 32


def linear(values, gamma):
    if gamma == "sRGB":
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return values**gamma


def shown(colours, space):
    """Levels of sRGB of colours [..., 1 or 3] in 0..1."""
    primaries, white, gamma = SPACES[space]
    colours = np.broadcast_to(colours, (*colours.shape[:-1], 3))
    return to_srgb_levels(linear(colours, gamma) @ to_xyz(primaries, white).T)


def samples(channels, bits, seed=0):
    """[H, W, channels] over all of the range, the darkest often."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(size=(HEIGHT, WIDTH, channels)) ** rng.choice([1, 4], size=(HEIGHT, WIDTH, 1))
    return np.rint(values * (2**bits - 1)).astype(np.uint32)


def load(tmp_path, data):
    (tmp_path / "picture").write_bytes(data)
    return np.asarray(load_picture(tmp_path / "picture", max_megapixels=1)).astype(float)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour_type", [GREY, GREY_ALPHA, RGB, RGBA])
def test_colours_are_those_of_the_profile_in_every_mode(tmp_path, space, bits, colour_type):
    channels = {GREY: 1, GREY_ALPHA: 2, RGB: 3, RGBA: 4}[colour_type]
    stored = samples(channels, bits)
    profile = rgb_profile(*SPACES[space])
    pixels = load(tmp_path, png(stored, colour_type, bits, chunks=[png_profile(profile)]))
    values = stored / (2**bits - 1)
    colours = 1 if channels < 3 else 3
    expected = shown(values[..., :colours], space)
    in_gamut = ((expected > 0) & (expected < 255)).all(axis=-1)
    if channels > colours:
        expected = expected * values[..., -1:] + 255 * (1 - values[..., -1:])
    off = abs(pixels - expected)
    assert off[in_gamut].max() <= 1
    # What sRGB cannot show is cut off; between corners of a cell of which some are, 16 bits are a level less sure.
    assert off.max() <= (1 if bits == 8 else 2)


@pytest.mark.parametrize("space", SPACES)
def test_a_palette_and_its_transparency_go_with_a_profile(tmp_path, space):
    palette = samples(3, 8).reshape(-1, 3)[:256]
    alpha = samples(1, 8, seed=1).reshape(-1)[:256]
    indexes = samples(1, 8, seed=2)
    chunks = [
        png_profile(rgb_profile(*SPACES[space])),
        png_chunk(b"PLTE", palette.astype(np.uint8).tobytes()),
        png_chunk(b"tRNS", alpha.astype(np.uint8).tobytes()),
    ]
    pixels = load(tmp_path, png(indexes, PALETTE, 8, chunks=chunks))
    opaque = alpha[indexes] / 255
    expected = shown(palette[indexes[..., 0]] / 255, space) * opaque + 255 * (1 - opaque)
    assert abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour_type", [GREY, RGB])
@pytest.mark.parametrize("profile", [None, rgb_profile(*SPACES["Adobe RGB"])])
def test_one_colour_may_be_the_transparent_one(tmp_path, bits, colour_type, profile):
    channels = {GREY: 1, RGB: 3}[colour_type]
    stored = samples(channels, bits)
    key = stored[5, 7]
    chunks = [png_chunk(b"tRNS", key.astype(">u2").tobytes())]
    if profile is not None:
        chunks.insert(0, png_profile(profile))
    pixels = load(tmp_path, png(stored, colour_type, bits, chunks=chunks))
    values = stored / (2**bits - 1)
    expected = np.broadcast_to(255 * values, (HEIGHT, WIDTH, 3)) if profile is None else shown(values, "Adobe RGB")
    expected = np.where((stored == key).all(axis=-1, keepdims=True), 255, expected)
    assert abs(pixels - expected).max() <= (1 if bits == 8 else 2)


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2, "sRGB"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour_type", [GREY, GREY_ALPHA])
def test_grey_has_the_curve_of_its_profile(tmp_path, gamma, bits, colour_type):
    stored = samples(1 + (colour_type == GREY_ALPHA), bits)
    pixels = load(tmp_path, png(stored, colour_type, bits, chunks=[png_profile(grey_profile(gamma))]))
    values = stored / (2**bits - 1)
    expected = to_srgb_levels(linear(values[..., :1], gamma) * D50_XYZ)
    if colour_type == GREY_ALPHA:
        expected = expected * values[..., 1:] + 255 * (1 - values[..., 1:])
    assert abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_inks_are_those_of_the_profile(tmp_path, bits):
    stored = samples(4, bits)
    profile = cmyk_profile()
    tags = tiff_tags(WIDTH, HEIGHT, samples=4, bits=bits, photometric=5) | {34675: (1, list(profile))}
    pixels = load(tmp_path, tiff(tags, stored.astype(f"<u{bits // 8}").tobytes()))
    lab = stored / (2**bits - 1) @ INKS + [100, 0, 0]
    assert abs(pixels - to_srgb_levels(lab_to_xyz(lab))).max() <= 1.5  # Lab of 8 bits in the profile itself


def test_a_profile_counts_by_its_content_and_not_by_its_name(tmp_path):
    stored = samples(3, 8)
    liar = rgb_profile(*SPACES["Adobe RGB"], name="sRGB IEC61966-2.1")
    pixels = load(tmp_path, png(stored, RGB, 8, chunks=[png_profile(liar)]))
    assert abs(pixels - shown(stored / 255, "Adobe RGB")).max() <= 1

    nameless = rgb_profile(SRGB_PRIMARIES, D65, "sRGB", name="camera")
    assert load(tmp_path, png(stored, RGB, 8, chunks=[png_profile(nameless)])).astype(int).tolist() == stored.tolist()


@pytest.mark.parametrize(
    "mode, profile",
    [
        ("RGB", grey_profile(1.0)),
        ("RGB", cmyk_profile()),
        ("CMYK", rgb_profile(*SPACES["Adobe RGB"])),
        ("CMYK", grey_profile(1.0)),
        ("L", cmyk_profile()),
        ("RGBA", grey_profile(1.0)),
        ("RGB", rgb_profile(*SPACES["Adobe RGB"])[:200]),
        ("RGB", b"no profile"),
    ],
)
def test_a_profile_that_is_damaged_or_of_other_samples_is_passed_over(mode, profile):
    picture = Image.fromarray(samples(3, 8).astype(np.uint8)).convert(mode)
    plain = np.asarray(to_srgb(picture.copy()))
    picture.info["icc_profile"] = profile
    np.testing.assert_array_equal(np.asarray(to_srgb(picture)), plain)


def test_lab_is_what_lab_says(tmp_path):
    lab = np.stack(np.meshgrid(np.linspace(0, 255, 16), np.arange(-20, 21, 10), np.arange(-20, 21, 10)), axis=-1)
    lab = np.rint(lab.reshape(1, -1, 3)).astype(int)
    tags = tiff_tags(lab.shape[1], 1, samples=3, photometric=8)
    tags[257], tags[256], tags[278] = (3, [20]), (3, [20]), (3, [20])
    pixels = load(tmp_path, tiff(tags, (lab & 255).astype(np.uint8).tobytes()))
    expected = to_srgb_levels(lab_to_xyz(lab.reshape(20, 20, 3) / [2.55, 1, 1]))
    assert abs(pixels - expected).max() <= 1.5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_white_and_grey_stay_so_under_a_profile(mode):
    picture = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    picture.info["icc_profile"] = rgb_profile(*SPACES["ProPhoto RGB"])
    assert np.asarray(to_srgb(picture)).min() >= 254


def test_pillows_own_srgb_changes_no_level():
    stored = samples(3, 8).astype(np.uint8)
    picture = Image.fromarray(stored)
    picture.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(np.asarray(to_srgb(picture)), stored)
