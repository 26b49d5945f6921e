from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import InputError
from data.sources.folders import list_folders
from data.sources.picture_file import PictureBytes
from data.sources.pictures import PICTURE_SUFFIXES, load_mask, load_picture, picture_size
from data.sources.problems import Findings
from tests.data.sources.made_pictures import LIMIT, SMOOTH, asymmetric_picture, stored_as
from tests.picture_files import RGB, png, png_chunk


def save_with_orientation(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(pixels).save(path, exif=exif, **options)


def png_that_claims(width, height):
    """A PNG of some 100 bytes whose header announces any size."""
    data = png(np.zeros((1, 1, 3), np.uint8), RGB, 8)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:8] + png_chunk(b"IHDR", header) + data[33:]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(tmp_path, suffix, orientation):
    upright = asymmetric_picture()
    path = tmp_path / f"turned{suffix}"
    save_with_orientation(path, stored_as(upright, orientation), orientation)
    np.testing.assert_array_equal(np.asarray(load_picture(path, max_megapixels=LIMIT)), upright)
    assert picture_size(path, max_megapixels=LIMIT) == (30, 18)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_stands_upright_by_its_own_marks(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.avif"
    Image.fromarray(stored_as(SMOOTH, orientation)).save(path, exif=exif, quality=100, subsampling="4:4:4")
    assert picture_size(path, max_megapixels=LIMIT) == (64, 43)
    assert abs(np.asarray(load_picture(path, max_megapixels=LIMIT)).astype(int) - SMOOTH).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_stands_upright(tmp_path, orientation):
    upright = asymmetric_picture()[..., 0]
    path = tmp_path / "mask.png"
    save_with_orientation(path, stored_as(upright, orientation), orientation)
    np.testing.assert_array_equal(np.asarray(load_mask(path, max_megapixels=LIMIT)), upright)
    assert picture_size(path, max_megapixels=LIMIT) == (30, 18)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photograph_of_a_phone_held_upright_stands_upright(tmp_path, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255
    path = tmp_path / "phone.jpg"
    save_with_orientation(path, stored_as(upright, orientation), orientation)
    loaded = np.asarray(load_picture(path, max_megapixels=LIMIT)).astype(int)
    assert abs(loaded - upright).max() < 40
    assert picture_size(path, max_megapixels=LIMIT) == (48, 32)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of the damage
def test_damaged_exif_leaves_a_picture_as_it_is_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a maker"
    damaged = bytearray(exif.tobytes())
    read = []
    for place in range(6, len(damaged)):
        broken = damaged.copy()
        broken[place] ^= 0xFF
        path = tmp_path / f"{place}.jpg"
        Image.fromarray(asymmetric_picture()).save(path, exif=bytes(broken))
        size = picture_size(path, max_megapixels=LIMIT)
        assert size in ((30, 18), (18, 30))
        assert load_picture(path, max_megapixels=LIMIT).size == size
        read.append(size)
    assert (30, 18) in read, "no damage hit the orientation"


@pytest.mark.fault(27, "a picture of 900 megapixels in few bytes")
@pytest.mark.parametrize("load", [picture_size, load_picture, load_mask])
def test_a_picture_above_the_limit_is_refused_undecoded(tmp_path, load):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(30000, 30000))
    with pytest.raises(
        InputError, match=r"bomb.png: 30000x30000 is 900 megapixels, above data.max_megapixels 64; it was"
    ):
        load(path, max_megapixels=LIMIT)


@pytest.mark.parametrize("load", [load_picture, load_mask, picture_size])
@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (33 * 7, 7)])
def test_a_strip_is_refused_undecoded(tmp_path, load, size):
    """Resized to fill a bucket with its short side, it would take gigabytes."""
    (tmp_path / "spacer.png").write_bytes(png_that_claims(*size))
    with pytest.raises(InputError, match=rf"spacer.png: {size[0]}x{size[1]} is more than 32 times as long as wide"):
        load(tmp_path / "spacer.png", max_megapixels=LIMIT)


def test_a_panorama_is_read(tmp_path):
    Image.new("RGB", (32 * 7, 7)).save(tmp_path / "wide.png")
    assert load_picture(tmp_path / "wide.png", max_megapixels=LIMIT).size == (32 * 7, 7)


def test_a_size_is_read_without_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda picture: pytest.fail(f"{picture} was decoded"))
    for kind in ("WebPImagePlugin.WebPImageFile", "AvifImagePlugin.AvifImageFile", "GifImagePlugin.GifImageFile"):
        monkeypatch.setattr(f"PIL.{kind}.load", lambda picture: pytest.fail("decoded"))
    for suffix in (".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".avif"):
        path = tmp_path / f"picture{suffix}"
        Image.fromarray(asymmetric_picture()).save(path)
        assert picture_size(path, max_megapixels=LIMIT) == (30, 18)
    save_with_orientation(tmp_path / "turned.png", asymmetric_picture(), 6)
    assert picture_size(tmp_path / "turned.png", max_megapixels=LIMIT) == (18, 30)


def test_exif_behind_a_pngs_pixels_counts(tmp_path):
    upright = asymmetric_picture()
    path = tmp_path / "late.png"
    save_with_orientation(path, stored_as(upright, 6), 6)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    rest, last = data[:start] + data[end:-12], data[-12:]
    path.write_bytes(rest + data[start:end] + last)
    assert picture_size(path, max_megapixels=LIMIT) == (30, 18)
    np.testing.assert_array_equal(np.asarray(load_picture(path, max_megapixels=LIMIT)), upright)


def test_the_limit_may_be_above_pillows_own(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_that_claims(20000, 20000))
    assert picture_size(path, max_megapixels=401.0) == (20000, 20000)


@pytest.mark.parametrize("load", [picture_size, load_picture, load_mask])
def test_a_missing_picture_is_named(tmp_path, load):
    with pytest.raises(InputError, match=r"gone.png: no such picture"):
        load(tmp_path / "gone.png", max_megapixels=LIMIT)


@pytest.mark.parametrize("load", [picture_size, load_picture, load_mask])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(50)])
def test_a_file_that_is_no_picture_is_named(tmp_path, load, content):
    path = tmp_path / "page.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"page.png: not a readable picture .* Replace or remove the file"):
        load(path, max_megapixels=LIMIT)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"the file is empty\)\. Replace or remove"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"Git LFS, .* Run `git lfs pull`\."),
    ],
)
def test_a_file_that_only_stands_for_a_picture_is_told(data, message):
    with pytest.raises(InputError, match=rf"cat\.png: .*{message}"):
        load_picture(PictureBytes(data, "cat.png"), max_megapixels=1)


@pytest.mark.parametrize("load", [load_picture, load_mask])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".avif"])
def test_a_truncated_picture_is_named(tmp_path, load, suffix):
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(asymmetric_picture(200, 300)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"cut{suffix}: .* (Replace|restore) or remove the file"):
        load(path, max_megapixels=LIMIT)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_is_refused_and_its_still_is_read(tmp_path, kind):
    path = tmp_path / "moving.png"
    still, other = Image.fromarray(SMOOTH), Image.fromarray(255 - SMOOTH)
    still.save(path, kind, save_all=True, append_images=[other, still])
    for load in (picture_size, load_picture, load_mask):
        with pytest.raises(InputError, match=r"moving\.png: is an animation of 3 frames, and nothing says which"):
            load(path, max_megapixels=LIMIT)
    still.save(path, kind)
    assert load_picture(path, max_megapixels=LIMIT).size == still.size


def test_a_photograph_with_others_behind_it_is_the_first(tmp_path):
    still, other = Image.fromarray(SMOOTH), Image.fromarray(255 - SMOOTH)
    still.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[other])
    loaded = np.asarray(load_picture(tmp_path / "phone.jpg", max_megapixels=LIMIT)).astype(int)
    assert abs(loaded - SMOOTH).mean() < 10


def test_every_suffix_of_a_picture_counts_as_one(tmp_path):
    names = {f"of-{suffix[1:]}{suffix.upper()}" for suffix in PICTURE_SUFFIXES}
    for name in names:
        (tmp_path / name).write_bytes(b"")
    found = {Path(item.target.place).name for item in list_folders(tmp_path, None, None, "photos", Findings())}
    assert found == names
    assert {".jpe", ".jfif", ".gif", ".avif"} <= PICTURE_SUFFIXES
