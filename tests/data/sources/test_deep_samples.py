"""All 16 bits of samples that Pillow gives the upper 8 of."""

import io

import numpy as np
import pytest
from PIL import Image

from data.sources.deep_samples import has_deep_samples, read_deep_samples
from tests.picture_files import GREY, GREY_ALPHA, RGB, RGBA, png, png_chunk, tiff, tiff_tags

HEIGHT, WIDTH = 11, 14


def stored(channels):
    return np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, channels), dtype=np.uint16)


def decode(picture):
    picture.load()
    return picture


def read(data):
    assert has_deep_samples(Image.open(io.BytesIO(data)))
    return read_deep_samples(lambda: Image.open(io.BytesIO(data)), decode)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    "colour_type, colours, channels", [(GREY, 1, 1), (GREY_ALPHA, 1, 2), (RGB, 3, 3), (RGBA, 3, 4)]
)
def test_a_png_keeps_every_bit(interlaced, colour_type, colours, channels):
    samples = stored(channels)
    deep = read(png(samples, colour_type, 16, interlaced=interlaced))
    np.testing.assert_array_equal(deep.colours, samples[..., :colours])
    if channels > colours:
        np.testing.assert_array_equal(deep.alpha, samples[..., -1])
    else:
        assert deep.alpha is None


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric, channels, extra", [(2, 3, None), (2, 4, 2), (2, 4, 1), (2, 4, 0), (5, 4, None)])
def test_a_tiff_keeps_every_bit(order, photometric, channels, extra):
    samples = stored(channels)
    tags = tiff_tags(WIDTH, HEIGHT, samples=channels, bits=16, photometric=photometric)
    if extra is not None:
        tags[338] = (3, [extra])
    deep = read(tiff(tags, samples.astype(f"{order}u2").tobytes(), order))
    np.testing.assert_array_equal(deep.colours, samples[..., : 3 if photometric == 2 else 4])
    assert (deep.alpha is None) == (extra in (None, 0))
    assert deep.premultiplied == (extra == 1)
    if deep.alpha is not None:
        np.testing.assert_array_equal(deep.alpha, samples[..., 3])


@pytest.mark.parametrize("colour_type, channels", [(GREY, 1), (RGB, 3)])
def test_the_transparent_colour_is_that_of_16_bits(colour_type, channels):
    samples = stored(channels)
    key = samples[3, 4].copy()
    samples[0, 0] = key ^ 1  # the same in 8 bits
    deep = read(png(samples, colour_type, 16, chunks=[png_chunk(b"tRNS", key.astype(">u2").tobytes())]))
    assert deep.alpha[3, 4] == 0 and deep.alpha[0, 0] == 65535 and (deep.alpha == 0).sum() == 1


@pytest.mark.parametrize("colour_type, channels", [(GREY, 1), (RGB, 3), (RGBA, 4)])
def test_8_bits_are_not_deep(colour_type, channels):
    assert not has_deep_samples(Image.open(io.BytesIO(png(stored(channels) >> 8, colour_type, 8))))
