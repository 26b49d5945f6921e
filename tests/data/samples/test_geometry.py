import numpy as np
import pytest
from PIL import Image

from data.samples.geometry import Bucket, buckets_of, choose_buckets, fit, plan_crop

RESOLUTIONS = [32, 48, 64, 256, 512, 768, 1024, 1536, 2048, 4096]
SIZES = [(64, 64), (1000, 1000), (1920, 1080), (1080, 1920), (4032, 3024), (333, 517), (5000, 400), (17, 900)]


def grey_picture(width, height, seed=0):
    """Mode RGB, three equal channels: as a picture and, in mode L, as a mask it has its marks at the same places."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (9, 13), dtype=np.uint8) * 255
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST).convert("RGB")


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_buckets_are_whole_tokens_of_about_the_same_area(resolution):
    buckets = buckets_of(resolution)
    assert Bucket(resolution, resolution) in buckets
    for bucket in buckets:
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert 0.5 <= bucket.height / bucket.width <= 2
        assert abs(bucket.height * bucket.width / resolution**2 - 1) <= 1 / 8
        assert Bucket(bucket.width, bucket.height) in buckets
        assert bucket.tokens * 64 == bucket.latent_size[0] * bucket.latent_size[1] * 16
    assert len(set(buckets)) == len(buckets)


@pytest.mark.parametrize(
    "size, expected",
    [((64, 64), "64x64"), ((80, 48), "48x80"), ((48, 80), "80x48"), ((800, 100), "48x80"), ((70, 64), "64x64")],
)
def test_a_picture_gets_the_bucket_of_its_shape(size, expected):
    assert [str(bucket) for bucket in choose_buckets(*size, [64], policy="one")] == [expected]


@pytest.mark.parametrize("size", SIZES)
def test_the_chosen_bucket_is_the_nearest_in_shape(size):
    (chosen,) = choose_buckets(*size, [1024], policy="one")

    def cut_off(bucket):  # of the picture's area, by covering the bucket
        ratio = (bucket.width / bucket.height) / (size[0] / size[1])
        return 1 - min(ratio, 1 / ratio)

    assert cut_off(chosen) <= min(map(cut_off, buckets_of(1024))) + 1e-9


@pytest.mark.parametrize(
    "size, expected",
    [((600, 600), "512x512"), ((1023, 1023), "768x768"), ((4000, 4000), "1024x1024"), ((9, 9), "512x512")],
)
def test_policy_one_takes_the_largest_bucket_that_needs_no_enlarging(size, expected):
    (bucket,) = choose_buckets(*size, [1024, 512, 768], policy="one")
    assert str(bucket) == expected


@pytest.mark.parametrize("size", SIZES)
def test_policy_each_gives_one_bucket_per_resolution(size):
    resolutions = [512, 768, 1024]
    chosen = choose_buckets(*size, resolutions, policy="each")
    assert len(chosen) == len(set(chosen)) == 3
    assert all(bucket in buckets_of(resolution) for bucket, resolution in zip(chosen, resolutions, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resolution", [64, 512, 1024])
def test_a_crop_covers_the_bucket_and_keeps_the_aspect(size, resolution):
    (bucket,) = choose_buckets(*size, [resolution], policy="one")
    crop = plan_crop(*size, bucket=bucket)
    assert 0 <= crop.left <= crop.width - bucket.width
    assert 0 <= crop.top <= crop.height - bucket.height
    assert crop.width == bucket.width or crop.height == bucket.height, "more was cut off than had to be"
    assert abs(crop.width - crop.height * size[0] / size[1]) <= max(1, 0.5 * size[0] / size[1]) + 1e-9
    assert abs(2 * crop.left + bucket.width - crop.width) <= 1
    assert abs(2 * crop.top + bucket.height - crop.height) <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bucket", [Bucket(64, 64), Bucket(48, 80), Bucket(80, 48)])
def test_target_source_and_mask_are_cut_alike(size, bucket):
    picture = grey_picture(*size)
    pixels = fit(picture, picture.convert("L"), picture, bucket)
    assert pixels.target.shape == pixels.image.shape == (bucket.height, bucket.width, 3)
    assert pixels.mask.shape == (bucket.height, bucket.width)
    assert pixels.mask.dtype == bool
    np.testing.assert_array_equal(pixels.target, pixels.image)
    np.testing.assert_array_equal(pixels.mask, pixels.target[..., 0] >= 128)


def test_a_mark_lands_where_the_crop_says():
    picture = Image.new("RGB", (300, 200))
    picture.paste((255, 255, 255), (180, 60, 210, 90))
    bucket = Bucket(64, 64)
    crop = plan_crop(300, 200, bucket)
    pixels = fit(picture, picture.convert("L"), None, bucket)
    rows, columns = np.nonzero(pixels.mask)
    scale = crop.height / 200
    assert abs(rows.min() - (60 * scale - crop.top)) <= 1
    assert abs(rows.max() + 1 - (90 * scale - crop.top)) <= 1
    assert abs(columns.min() - (180 * scale - crop.left)) <= 1
    assert abs(columns.max() + 1 - (210 * scale - crop.left)) <= 1


def test_a_picture_of_the_buckets_size_is_not_touched():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    mask = np.zeros((48, 80), np.uint8)
    mask[5, 7] = 255
    fitted = fit(Image.fromarray(pixels), Image.fromarray(mask), None, Bucket(48, 80))
    np.testing.assert_array_equal(fitted.target, pixels)
    np.testing.assert_array_equal(fitted.image, pixels)
    np.testing.assert_array_equal(fitted.mask, mask == 255)


def test_pictures_of_different_sizes_are_refused():
    picture = grey_picture(64, 64)
    with pytest.raises(ValueError, match=r"differ in size: \[\(64, 64\), \(65, 64\)\]"):
        fit(picture, grey_picture(65, 64).convert("L"), None, Bucket(64, 64))


def test_a_buckets_name_is_read_back():
    for bucket in (Bucket(48, 80), Bucket(1024, 1024)):
        assert Bucket.parse(str(bucket)) == bucket
