import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import Progress

from configs.errors import InputError
from data.samples import cut_masks
from data.samples.cut_masks import _is_surely_left, what_lacks
from data.samples.decode import load_pixels
from data.samples.geometry import choose_buckets, fit_mask, plan_crop
from data.samples.plan import find_pictures, plan_found, plan_samples
from data.sources.mask_reach import measure_reach
from data.sources.problems import Findings
from tests.data.samples.made_pictures import folders


def random_mask(generator, size):
    """Boxes, discs, strokes and specks anywhere, most of them small, in black on white or white on black; some soft,
    some of grey, some noisy."""
    width, height = size
    inverted = bool(generator.integers(2))
    white = int(generator.choice([255, 255, 255, 200, 140]))
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for _ in range(generator.integers(1, 5)):
        x, y = generator.integers(width), generator.integers(height)
        if generator.random() < 0.5:  # where crops end, or beside it
            x, y = (
                (generator.integers(3) * width // 2, y) if width > height else (x, generator.integers(3) * height // 2)
            )
        reach = int(2 ** generator.uniform(0, np.log2(max(size))))
        box = (x, y, x + reach, y + int(reach * generator.uniform(0.1, 1)))
        kind = generator.integers(4)
        if kind == 0:
            draw.rectangle(box, fill=white)
        elif kind == 1:
            draw.ellipse(box, fill=white)
        elif kind == 2:
            draw.line(box, fill=white, width=int(generator.integers(1, 9)))
        else:
            draw.point([(x, y), box[2:]], fill=white)
    if generator.random() < 0.3:
        mask = mask.filter(ImageFilter.GaussianBlur(generator.uniform(0.5, 8)))
    levels = np.asarray(mask).astype(np.int16)
    if generator.random() < 0.2:
        levels = levels + generator.normal(0, 20, levels.shape)
    levels = np.clip(levels, 0, 255).astype(np.uint8)
    return Image.fromarray(255 - levels if inverted else levels)


def random_size(generator):
    """Of any shape up to 1:8, smaller or larger than its bucket."""
    side = 2 ** generator.uniform(5, 10)
    stretch = 2 ** (generator.uniform(-1.5, 1.5))
    return max(8, int(side * stretch)), max(8, int(side / stretch))


def test_what_the_scan_tells_of_a_mask_is_never_more_than_encoding_finds():
    """A property of random masks and crops: what is taken without another look has hole and kept part at its size."""
    generator = np.random.default_rng(1)
    sure = cut = 0
    for _ in range(500):
        size = random_size(generator)
        mask = random_mask(generator, size)
        (bucket,) = choose_buckets(*size, [int(generator.choice([32, 64, 128, 256]))], policy="each")
        lack = what_lacks(fit_mask(mask, bucket))
        is_sure = _is_surely_left(measure_reach(mask), size, bucket, plan_crop(*size, bucket=bucket))
        assert not (is_sure and lack), (size, bucket, lack)
        sure, cut = sure + is_sure, cut + (lack is not None)
    assert sure > 80 and cut > 30, "the masks are of one kind"


def write_masks(folder, masks):
    for role in ("target", "mask"):
        (folder / role).mkdir(parents=True)
    for number, mask in enumerate(masks):
        noise = np.random.default_rng(number).integers(0, 256, (*mask.size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "target" / f"{number:03d}.png")
        mask.save(folder / "mask" / f"{number:03d}.png")


@pytest.mark.parametrize("policy", ["one", "each"])
def test_what_the_plan_takes_encoding_takes_and_what_it_refuses_encoding_would(config_of, tmp_path, policy):
    generator = np.random.default_rng(2)
    folder = tmp_path / "pictures"
    masks = [random_mask(generator, random_size(generator)) for _ in range(60)]
    write_masks(folder, [mask for mask in masks if mask.getextrema()[0] < 128 <= mask.getextrema()[1]])
    config = config_of(
        folders(folder, check_masks="off"), f"data.resolution_policy={policy}", "data.resolution=[32, 64]"
    )
    findings = Findings()
    found = find_pictures(config, Progress(disable=True), findings)
    cut = [f"{problem.where}: {problem.what}" for problem in findings.problems]
    refused = set()
    for sample in plan_found(config, found, Progress(disable=True).console):
        try:
            load_pixels(sample, config.data)
        except InputError as error:
            refused.add(str(error).partition(". Crop")[0])
    assert refused == set(cut)
    assert 0 < len(cut) < len(found)


def test_all_masks_that_their_crop_cuts_off_are_told_with_the_other_problems(config_of, tmp_path):
    masks = [Image.new("L", (320, 32)) for _ in range(4)]
    for number, box in enumerate([(0, 0, 40, 32), (150, 0, 170, 32), (280, 0, 320, 32)]):
        masks[number].paste(255, box)
    masks.append(Image.new("L", (1600, 1600)))
    masks[-1].paste(255, (800, 800, 803, 803))
    write_masks(tmp_path / "pictures", masks)
    with pytest.raises(InputError) as raised:
        plan_samples(config_of(folders(tmp_path / "pictures"), "data.resolution=32"), Progress(disable=True))
    lines = {line.rpartition("/")[2][:3]: line for line in str(raised.value).splitlines()}
    assert lines.keys() == {"000", "002", "003", "004"}
    assert lines["000"].endswith(
        "000.png: at the size of its bucket, 32x32, there is nothing to paint: of the picture, resized to 320 px wide "
        "and 32 px high, the middle is kept, and that part is cut off, or smaller than a pixel. Crop the triple "
        "yourself, or remove it."
    )
    assert "the mask is all black" in lines["003"], "which is told once"
    assert "resized to 32 px wide and 32 px high" in lines["004"]


def test_a_thin_mask_is_decoded_for_its_crop_once_and_again_where_it_is_another(config_of, tmp_path, monkeypatch):
    masks = [Image.new("L", (64, 64)) for _ in range(3)]
    for number, mask in enumerate(masks):
        ImageDraw.Draw(mask).line((10, 10 + number, 50, 30), fill=255, width=2)
    masks[0].paste(255, (20, 20, 40, 40))
    write_masks(tmp_path / "pictures", masks)
    decoded, load_mask = [], cut_masks.load_mask
    monkeypatch.setattr(
        cut_masks, "load_mask", lambda file, **more: decoded.append(file.place[-7:]) or load_mask(file, **more)
    )

    def decoded_by_planning(resolution):
        decoded.clear()
        config = config_of(folders(tmp_path / "pictures"), f"data.resolution={resolution}")
        assert len(plan_samples(config, Progress(disable=True))) == 3
        return sorted(decoded)

    assert decoded_by_planning(64) == ["001.png", "002.png"]
    assert decoded_by_planning(64) == []
    assert decoded_by_planning(48) == ["001.png", "002.png"]
    with Image.open(tmp_path / "pictures/mask/001.png") as mask:
        mask.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "pictures/mask/001.png")
    assert decoded_by_planning(64) == ["001.png"]
    assert json.loads((tmp_path / "cache/scan/photos/fitting-1.json").read_text().partition("\n")[2])
