"""Modes, depths, transparency and colour profiles of pictures, against other decoders (data/sources/pictures.py)."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageCms

from configs.errors import InputError
from data.sources.pictures import load_mask, load_picture, picture_size
from tests.data.sources.made_pictures import LIMIT, SMOOTH, asymmetric_picture, stored_as
from tests.picture_files import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, png, png_chunk


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_of_16_bits_stands_upright(tmp_path, orientation):
    upright = asymmetric_picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunks = [png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))]
    data = png(stored_as(upright, orientation).astype(np.uint16) * 257, RGB, 16, chunks=chunks)
    np.testing.assert_array_equal(load_bytes(tmp_path, data), upright)


def test_transparent_parts_stand_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (0, 0, 0, 51)  # a fifth black, four fifths the white behind it
    path = tmp_path / "cut-out.png"
    Image.fromarray(rgba).save(path)
    pixels = np.asarray(load_picture(path, max_megapixels=LIMIT))
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 1].tolist() == [204, 204, 204]
    assert pixels[2, 2].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    picture = load_picture(path, max_megapixels=LIMIT)
    assert picture.mode == "RGB"
    assert np.asarray(picture).min() >= 254


def test_a_palettes_transparent_colour_is_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 0, 0, 0, 0, 200])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png", transparency=1)
    loaded = load_picture(tmp_path / "palette.png", max_megapixels=LIMIT)
    assert np.asarray(loaded).tolist() == [[[200, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_keeps_its_shades(tmp_path, suffix):
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(shades * 257).save(path)
    np.testing.assert_array_equal(np.asarray(load_mask(path, max_megapixels=LIMIT)), shades)
    np.testing.assert_array_equal(np.asarray(load_picture(path, max_megapixels=LIMIT))[..., 1], shades)


def test_32_bit_pixels_are_refused(tmp_path):
    path = tmp_path / "depth.tif"
    Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    with pytest.raises(InputError, match=r"depth.tif: has 32-bit pixels.* Save it as PNG of 8 bits"):
        load_mask(path, max_megapixels=LIMIT)


def mask_with_alpha(path, colours, alpha):
    """colours, alpha: four levels each, of a mask of four stripes."""
    levels, alphas = (np.repeat(np.array(values, np.uint8), 8).reshape(4, 8) for values in (colours, alpha))
    Image.fromarray(np.stack([levels, levels, levels, alphas], -1)).save(path)
    return levels


@pytest.mark.parametrize(
    "colours, alpha",
    [
        ([0, 255, 0, 0], [255, 255, 255, 255]),
        ([0, 255, 0, 0], [90, 90, 90, 90]),
        ([0, 255, 255, 0], [0, 255, 255, 0]),  # the hole painted on a transparent layer
        ([0, 255, 255, 0], [255, 0, 0, 255]),  # the hole cut out
        ([0, 255, 255, 0], [0, 255, 130, 0]),  # with a soft edge
        ([0, 255, 255, 0], [0, 120, 120, 0]),  # on a layer of half the strength
    ],
)
def test_a_masks_colours_count_where_its_transparency_says_no_other(tmp_path, colours, alpha):
    levels = mask_with_alpha(tmp_path / "mask.png", colours, alpha)
    np.testing.assert_array_equal(np.asarray(load_mask(tmp_path / "mask.png", max_megapixels=LIMIT)), levels)


@pytest.mark.parametrize(
    "colours, alpha",
    [
        ([255, 255, 255, 255], [0, 255, 255, 0]),
        ([0, 0, 0, 0], [0, 255, 255, 0]),
        ([20, 200, 90, 130], [255, 0, 0, 255]),  # the picture itself, the hole cut out
        ([0, 255, 0, 0], [0, 255, 255, 255]),
    ],
)
def test_a_mask_whose_transparency_says_other_than_its_colours_is_refused(tmp_path, colours, alpha):
    mask_with_alpha(tmp_path / "mask.png", colours, alpha)
    with pytest.raises(InputError, match=r"mask\.png: the mask is partly transparent, .* Save it without transparency"):
        load_mask(tmp_path / "mask.png", max_megapixels=LIMIT)


@pytest.mark.parametrize("load", [load_picture, load_mask])
def test_lab_colours_are_read(tmp_path, load):
    lab = np.zeros((4, 4, 3), np.uint8)
    lab[:2, :, 0], lab[2:, :, 0] = 255, 0
    Image.fromarray(lab, "LAB").save(tmp_path / "lab.tif")
    pixels = np.asarray(load(tmp_path / "lab.tif", max_megapixels=LIMIT))
    assert pixels[0].min() >= 250 and pixels[3].max() <= 5


def load_bytes(tmp_path, data):
    (tmp_path / "picture").write_bytes(data)
    return np.asarray(load_picture(tmp_path / "picture", max_megapixels=LIMIT)).astype(float)


def on_white(samples):
    """[H, W], or [H, W, 1 to 4] in 0..255 -> levels of RGB."""
    samples = samples[..., None] if samples.ndim == 2 else samples
    channels = samples.shape[-1]
    colours = samples[..., :3] if channels > 2 else np.repeat(samples[..., :1], 3, axis=-1)
    opaque = samples[..., -1:] / 255 if channels in (2, 4) else 1
    return colours * opaque + 255 * (1 - opaque)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    "colour_type, bits, channels",
    [*((GREY, bits, 1) for bits in (1, 2, 4, 8, 16))]
    + [(kind, bits, channels) for kind, channels in ((RGB, 3), (GREY_ALPHA, 2), (RGBA, 4)) for bits in (8, 16)],
)
def test_a_png_is_what_another_decoder_reads(tmp_path, interlaced, colour_type, bits, channels):
    samples = np.random.default_rng(0).integers(0, 2**bits, (19, 26, channels))
    data = png(samples, colour_type, bits, interlaced=interlaced)
    other = imagecodecs.png_decode(data) / (257 if bits == 16 else 1)
    assert abs(other.reshape(19, 26, channels) - samples * 255 / (2**bits - 1)).max() < 0.01
    assert abs(load_bytes(tmp_path, data) - on_white(other)).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_level_of_grey_is_what_another_decoder_reads(tmp_path, bits):
    samples = np.random.default_rng(0).integers(0, 2**bits, (19, 26, 1))
    for level in range(0, 2**bits, 3):
        data = png(samples, GREY, bits, chunks=[png_chunk(b"tRNS", level.to_bytes(2, "big"))])
        assert abs(load_bytes(tmp_path, data) - on_white(imagecodecs.png_decode(data))).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_is_what_another_decoder_reads(tmp_path, bits, transparent):
    rng = np.random.default_rng(0)
    chunks = [png_chunk(b"PLTE", rng.bytes(3 * 2**bits))]
    if transparent:
        chunks.append(png_chunk(b"tRNS", rng.bytes(2 ** (bits - 1))))
    data = png(rng.integers(0, 2**bits, (19, 26, 1)), PALETTE, bits, chunks=chunks)
    assert abs(load_bytes(tmp_path, data) - on_white(imagecodecs.png_decode(data))).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        *(imagecodecs.jpeg8_encode(SMOOTH, 90, subsampling=subsampling) for subsampling in ("444", "422", "420")),
        imagecodecs.jpeg8_encode(SMOOTH, 90, colorspace="rgb", outcolorspace="rgb"),
        imagecodecs.jpeg8_encode(SMOOTH[..., 0].copy(), 90),
    ],
)
def test_a_jpeg_is_what_another_decoder_reads(tmp_path, data):
    assert abs(load_bytes(tmp_path, data) - on_white(imagecodecs.jpeg8_decode(data))).max() <= 1


@pytest.mark.parametrize("stored", ["cmyk", "ycck"])
def test_inks_of_a_jpeg_are_turned_over_as_adobe_stores_them(tmp_path, stored):
    inks = np.dstack([SMOOTH, 255 - SMOOTH[..., 1]])
    data = imagecodecs.jpeg8_encode(inks, 90, colorspace="cmyk", outcolorspace=stored)
    other = imagecodecs.jpeg8_decode(data, outcolorspace="cmyk").astype(float)
    assert abs(load_bytes(tmp_path, data) - other[..., :3] * other[..., 3:] / 255).max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_webp_avif_and_gif_are_what_another_decoder_reads(tmp_path, channels):
    samples = np.dstack([SMOOTH, 255 - SMOOTH[..., :1]])[..., :channels]
    samples = np.ascontiguousarray(samples[..., 0] if channels == 1 else samples)
    encoded = [(imagecodecs.avif_encode(samples, 100), imagecodecs.avif_decode)]
    if channels == 1:
        encoded.append((imagecodecs.gif_encode(samples), lambda data: imagecodecs.gif_decode(data).reshape(43, 64, -1)))
    else:
        encoded.append((imagecodecs.webp_encode(samples, lossless=True), imagecodecs.webp_decode))
        encoded.append((imagecodecs.webp_encode(samples, 80), imagecodecs.webp_decode))
    for data, decode in encoded:
        assert abs(load_bytes(tmp_path, data) - on_white(decode(data).astype(float))).max() <= 1


@pytest.mark.parametrize("bits", [10, 12])
def test_an_avif_of_more_bits_is_what_was_encoded(tmp_path, bits):
    samples = np.rint(SMOOTH / 255 * (2**bits - 1)).astype(np.uint16)
    data = imagecodecs.avif_encode(samples, 100, bitspersample=bits)
    assert abs(load_bytes(tmp_path, data) - SMOOTH).max() <= 1


def bmp(bits, pixels, masks=()):
    """pixels: [H, W] words, stored from the lowest row up.  masks: of red, green, blue (and alpha) in a word."""
    header_size = 124 if len(masks) == 4 else 40
    size = (header_size, pixels.shape[1], pixels.shape[0], 1, bits, 3 if masks else 0, 0, 0, 0, 0, 0)
    header = struct.pack("<IiiHHIIiiII", *size) + struct.pack(f"<{len(masks)}I", *masks)
    header = header.ljust(header_size, b"\0")
    return struct.pack("<2sIII", b"BM", 0, 0, 14 + len(header)) + header + pixels[::-1].tobytes()


@pytest.mark.parametrize("masks", [(), (0xF800, 0x7E0, 0x1F)])
def test_a_bmp_of_16_bits_a_pixel_spans_black_to_white(tmp_path, masks):
    words = np.random.default_rng(0).integers(0, 65536, (6, 8)).astype("<u2")
    parts = (
        [(words >> 11 & 31) / 31, (words >> 5 & 63) / 63]
        if masks
        else [(words >> place & 31) / 31 for place in (10, 5)]
    )
    expected = 255 * np.stack([*parts, (words & 31) / 31], axis=-1)
    assert abs(load_bytes(tmp_path, bmp(16, words, masks)) - expected).max() <= 1


@pytest.mark.parametrize("masks", [(), (0xFF0000, 0xFF00, 0xFF, 0xFF000000), (0xFF0000, 0xFF00, 0xFF, 0)])
def test_a_bmps_fourth_byte_is_alpha_where_it_says_so(tmp_path, masks):
    samples = np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    pixels = samples[..., [2, 1, 0, 3]].copy().view("<u4")[..., 0]
    expected = on_white(samples.astype(float) if masks and masks[3] else samples[..., :3].astype(float))
    assert abs(load_bytes(tmp_path, bmp(32, pixels, masks)) - expected).max() <= 1


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_and_profiles_may_be_larger_than_pillows_limit(tmp_path, kind):
    heads = {b"zTXt": b"workflow\0\0", b"iTXt": b"workflow\0\1\0\0\0", b"iCCP": b"scanner\0\0"}
    path = tmp_path / "a.png"
    for mebibytes in (2, 15, 17):
        content = heads[kind] + zlib.compress(bytes(mebibytes << 20))
        path.write_bytes(png(SMOOTH, RGB, 8, chunks=[png_chunk(kind, content)]))
        if mebibytes < 16:
            np.testing.assert_array_equal(np.asarray(load_picture(path, max_megapixels=LIMIT)), SMOOTH)
        else:
            with pytest.raises(InputError, match=r"a\.png: .* unpack to more than 16 MiB\. Strip its metadata \("):
                picture_size(path, max_megapixels=LIMIT)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# A space whose red is sRGB's green, and the other way round.
SWAPPED = SRGB.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
SWAPPED = SWAPPED.replace(b"rXYZ", b"xxxx").replace(b"gXYZ", b"rXYZ").replace(b"xxxx", b"gXYZ")


def colours(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_colours_are_those_of_the_profile(tmp_path, suffix):
    options = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(colours()).save(tmp_path / f"a{suffix}", icc_profile=SWAPPED, **options)
    pixels = np.asarray(load_picture(tmp_path / f"a{suffix}", max_megapixels=LIMIT)).astype(int)
    assert abs(pixels - colours()[..., [1, 0, 2]]).max() <= 2


@pytest.mark.parametrize("profile", [None, SRGB, b"no profile", SWAPPED[:300], SWAPPED.replace(b"RGB XYZ", b"CMYKXYZ")])
def test_a_picture_stays_as_it_is_with_a_profile_of_srgb_or_a_broken_one(tmp_path, profile):
    Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(load_picture(tmp_path / "a.png", max_megapixels=LIMIT)), colours())


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_a_profile_goes_with_every_mode(tmp_path, mode):
    """White is white, grey is grey, and what is transparent stands on white."""
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture = Image.new("RGBA" if mode in ("LA", "RGBA") else "RGB", (8, 8), "white")
    if "A" in mode:
        picture.paste((90, 90, 90, 0), (0, 0, 4, 8))
    picture.convert(mode).save(path, icc_profile=SWAPPED)
    loaded = load_picture(path, max_megapixels=LIMIT)
    assert loaded.mode == "RGB" and np.asarray(loaded).min() >= 253


def test_a_profile_stands_upright_with_its_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=SWAPPED, exif=exif)
    pixels = np.asarray(load_picture(tmp_path / "a.png", max_megapixels=LIMIT)).astype(int)
    assert abs(pixels - np.rot90(colours()[..., [1, 0, 2]], -1)).max() <= 2


def test_a_masks_profile_changes_no_level(tmp_path):
    Image.fromarray(colours()[..., 0]).save(tmp_path / "a.png", icc_profile=SWAPPED)
    np.testing.assert_array_equal(np.asarray(load_mask(tmp_path / "a.png", max_megapixels=LIMIT)), colours()[..., 0])
