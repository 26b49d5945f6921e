import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from data.cache.manifest import read_shard_table
from data.encoders.load import Encoders, load_encoders
from data.encoders.model_folder import encoder_fingerprints, find_model
from data.preprocessing.dry_run import Estimate, bytes_by_part, measure, print_counts, print_hours
from data.preprocessing.job import Job, make_plan
from data.preprocessing.run import dry_run, preprocess
from data.preprocessing.worker import Worker
from tests.data.made_caches import index_of

ALONE = Worker()


def printed_by_dry_run(config, worker=ALONE):
    text = io.StringIO()
    dry_run(config, Console(file=text, width=160), worker)
    return text.getvalue()


def rows(printed):
    """The table's rows, as lists of cells."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_it_counts_measures_and_begins_nothing(demo_config, tmp_path):
    config = demo_config(tmp_path / "cache", "data.encode_batch_size=4")
    printed = printed_by_dry_run(config, Worker(0, 8))
    assert [path.name for path in config.data.cache.iterdir()] == ["scan"], "what it learned of pictures, no more"
    table = rows(printed)
    assert {split for _, _, split, *_ in table} == {"train", "holdout"}
    assert sum(int(row[3]) for row in table) == sum(int(row[4]) for row in table) == 96
    assert re.search(
        r"64x64, measured: VAE \d+\.\d pictures/s, 4 at once, text \d+\.\d captions/s, 4 at once, decoding", printed
    )
    assert re.search(r"About \S+ minutes with one such worker, \S+ minutes with 8 like it; \S+.* set the pace", printed)
    preprocess(config, Console(quiet=True))
    assert sum(int(row[5]) for row in table) == len(read_shard_table(config.data.cache))


def test_what_is_there_is_not_to_do(demo_config, tmp_path):
    config = demo_config(tmp_path / "cache")
    preprocess(config, Console(quiet=True))
    printed = printed_by_dry_run(config)
    assert all(row[4] == row[6] == "0" for row in rows(printed))
    assert "hours" not in printed and "minutes" not in printed

    table = read_shard_table(config.data.cache)
    lost = max(range(len(table)), key=lambda row: table.samples[row])
    index_of(config.data.cache / str(table.path[lost])).unlink()
    todo = [row for row in rows(printed_by_dry_run(config)) if row[4] != "0"]
    assert [(row[4], row[6]) for row in todo] == [(str(table.samples[lost]), "1")]


def test_the_bytes_are_those_that_are_written(demo_config, tmp_path):
    config = demo_config(tmp_path / "cache")
    preprocess(config, Console(quiet=True))
    model = find_model(config.model.base)
    job = Job(config, model, encoder_fingerprints(model))
    parts = bytes_by_part(make_plan(job, Progress(disable=True)), text_bytes=job.text_bytes)
    assert sum(parts.values()) == pytest.approx(int(read_shard_table(config.data.cache).bytes.sum()), rel=0.1)


@pytest.mark.parametrize("own, device", [(False, 960.0), (True, 480.0)])
def test_text_on_its_own_device_takes_no_time_of_the_vaes(demo_config, tmp_path, monkeypatch, own, device):
    """It is encoded beside it: the busier of the two sets the pace."""
    config = demo_config(tmp_path / "cache", "data.captions.trigger=a")
    model = find_model(config.model.base)
    plans = make_plan(Job(config, model, encoder_fingerprints(model)), Progress(disable=True))
    captions = sum(len({sample.text for sample in plan.samples}) for plan in plans)
    monkeypatch.setattr(Encoders, "text_has_its_own_device", own)
    monkeypatch.setattr("data.preprocessing.dry_run.time_pixels", lambda *_: 5.0)
    monkeypatch.setattr("data.preprocessing.dry_run.time_captions", lambda *_: 480.0 / captions)
    encoders = load_encoders(model, config.data.encoders, device_index=0)
    estimate = measure(plans, encoders, config.data, ALONE, Console(quiet=True))
    assert estimate.device == pytest.approx(device)


@pytest.mark.parametrize(
    "estimate, expected",
    [
        (Estimate(device=7200 * 4, decode=100), "About 8.0 hours with one such worker, 2.0 hours with 4 like it; the"),
        (Estimate(device=60, decode=600), "About 10.0 minutes with one such worker, 2.5 minutes with 4 like it; dec"),
    ],
)
def test_hours_are_those_of_the_slower_side_shared_by_the_workers(estimate, expected):
    text = io.StringIO()
    print_hours(Console(file=text, width=160), estimate, Worker(0, 4))
    assert text.getvalue().startswith(expected)


def test_a_path_is_shown_as_it_is_whatever_rich_makes_of_brackets():
    text = io.StringIO()
    print_counts(Console(file=text, width=160), Path("/d/[bold]x[/y]"), [], [])
    assert "cache /d/[bold]x[/y]" in text.getvalue()
