import io
from collections import Counter

import pytest
from rich.console import Console

from configs.data_schema import CaptionsConfig
from data.samples.geometry import choose_buckets, plan_crop
from data.samples.plan import TRAIN, PlannedSample
from data.samples.summary import print_captions, print_summary
from data.sources.items import DEFAULT, NONE, OWN
from data.sources.picture_file import PictureFile
from data.sources.triples import Triple


def sample(name, size, *, caption="", flip=False):
    triple = Triple("cats", name, PictureFile(name), None, None, caption, "0" * 32, "0" * 32)
    (bucket,) = choose_buckets(*size, [64], policy="one")
    return PlannedSample(triple, size, bucket, plan_crop(*size, bucket=bucket), TRAIN, flip=flip)


def printed(print_it, *arguments):
    console = Console(file=io.StringIO(), record=True, width=80)
    print_it(console, *arguments)
    return console.export_text()


def test_what_is_much_enlarged_or_cropped_is_counted_and_the_worst_five_are_named():
    samples = [sample(f"small-{side}", (side, side)) for side in (16, 20, 24, 28, 32, 40, 43)]  # 64 / 43 is below 1.5
    samples += [sample("fits", (64, 64)), sample("[b]strip", (640, 64)), sample("small-16", (16, 16), flip=True)]
    text = printed(print_summary, samples, CaptionsConfig())
    assert "enlarged above 1.5x: 6 of 9 samples, the most small-16 (4.0x), small-20 (3.2x)" in text
    assert "small-32 (2.0x)\n" in text and "small-40" not in text
    assert "cropped by more than 20%: 1 of 9 samples, the most [b]strip (83%)" in text


def test_sound_pictures_have_no_line():
    assert "above" not in printed(print_summary, [sample("fits", (64, 64), caption="a")], CaptionsConfig())


def test_captions_are_counted_by_whose_they_are():
    captions = CaptionsConfig(default="a photo", trigger="sks")
    samples = [sample(str(n), (64, 64), caption=text) for n, text in enumerate(["sks, a cat"] * 3 + ["sks, a photo"])]
    text = printed(print_summary, samples, captions)
    assert text == "captions of 4 samples: 3 of their own, 1 the default, 0 none\n"


@pytest.mark.parametrize(
    "counts, loud",
    [
        ({OWN: 4, NONE: 6}, True),
        ({OWN: 4, DEFAULT: 6}, True),
        ({NONE: 10}, True),
        ({OWN: 5, NONE: 5}, False),
        ({DEFAULT: 10}, False),  # one text for all is meant
    ],
)
def test_more_than_half_without_a_caption_is_said_loudly(counts, loud):
    assert ("have no caption of their own" in printed(print_captions, Counter(counts))) == loud
