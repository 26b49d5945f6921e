"""A few pictures of any source are those of the source: the same samples come of them."""

import json
import tarfile

import numpy as np
import pytest
from rich.progress import Progress

from configs.loading import load_config
from data.samples.decode import load_pixels
from data.samples.plan import plan_samples
from launch.check.few_pictures import write_few_pictures


def plan(config):
    return {sample.triple.target_content: sample for sample in plan_samples(config, Progress(disable=True))}


@pytest.fixture
def sources(folder):
    """Overrides by which the folder's triples come from folders, a tar and a table."""
    stems = sorted(path.stem for path in (folder / "target").glob("*.png"))
    with tarfile.open(folder / "all.tar", "w") as tar:
        for stem in stems:
            for role in ("target", "mask", "source"):
                tar.add(folder / role / f"{stem}.png", arcname=f"{stem}.{role}.png")
            tar.add(folder / "target" / f"{stem}.txt", arcname=f"{stem}.txt")
    rows = [
        {role: str(folder / role / f"{stem}.png") for role in ("target", "mask", "source")}
        | {"caption": (folder / "target" / f"{stem}.txt").read_text()}
        for stem in stems
    ]
    (folder / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {
        "folders": [],
        "folders, dilated and flipped": [
            f"data.datasets.0.mask={{folder: {folder / 'mask'}, dilate: [2, 2], variants: 1}}",
            "data.datasets.0.flip=true",
        ],
        "random masks": ["data.datasets.0.mask={random: {box: 1.0}, variants: 2}", "data.datasets.0.source=null"],
        "tar": [f"data.datasets.0={{name: photographs, tars: {folder / 'all.tar'}, members: {{source: source.png}}}}"],
        "table": [
            f"data.datasets.0={{name: photographs, table: {folder / 'list.jsonl'}, columns: {{source: source}}}}"
        ],
    }


@pytest.mark.parametrize("kind", ["folders", "folders, dilated and flipped", "random masks", "tar", "table"])
def test_the_same_samples_come_of_a_few(kind, sources, config_file, tmp_path):
    overrides = ["data.captions.trigger=sks", *sources[kind]]
    config = load_config(config_file, overrides)
    samples = plan_samples(config, Progress(disable=True))
    few = write_few_pictures(config.data, samples, tmp_path / "few")
    of_few = load_config(config_file, [*overrides, *few, f"data.cache={tmp_path / 'other'}"])
    planned, all_of_them = plan(of_few), plan(config)
    assert planned.keys() == all_of_them.keys()  # six are fewer than are encoded at once
    for content, sample in planned.items():
        original = all_of_them[content]
        assert sample.triple.caption == original.triple.caption and sample.bucket == original.bucket
        masks = zip(load_pixels(sample, of_few.data), load_pixels(original, config.data), strict=True)
        assert all(
            np.array_equal(one.mask, other.mask) and np.array_equal(one.image, other.image) for one, other in masks
        )


def test_the_largest_are_taken_and_no_more_than_are_encoded_at_once(config_file, tmp_path):
    config = load_config(config_file, ["data.encode_batch_size=2"])
    samples = plan_samples(config, Progress(disable=True))
    write_few_pictures(config.data, samples, tmp_path / "few")
    written = {path.stem for path in (tmp_path / "few" / "photographs" / "target").glob("*.png")}
    largest = sorted((sample.bucket.tokens for sample in samples), reverse=True)[:2]
    assert sorted((s.bucket.tokens for s in samples if s.triple.key in written), reverse=True) == largest
