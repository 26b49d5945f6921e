"""A run that encodes while it trains, beside the same run from a cache. A CPU stands in for the encoders' device."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import RankFailure, run_ranks

STEPS, HALF = 6, 3
ONLINE = ("data.mode=online", "data.encoder_devices=[cpu]", "data.encode_batch_size=3")


def train(arguments: list[str]) -> int:
    """The trainer, in a forked rank."""
    from trainer.main import train

    return train(arguments)


@pytest.fixture(scope="module")
def launch(config, tmp_path_factory) -> Callable[..., Path]:
    """Runs the trainer: `launch(engine, processes, name, "key=value", ...)`; returns the run's folder."""
    from configs.loading import dump_config

    runs = tmp_path_factory.mktemp("runs")
    path = runs / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")

    def run(engine: str, num_processes: int, name: str, *overrides: str) -> Path:
        quick = [
            f"run.dir={runs}",
            "method={type: lora, rank: 4}",
            "train.global_batch_size=5",
            "train.micro_batch_size=1",
            f"train.steps={STEPS}",
            "train.lr=1e-3",
            "train.lr_schedule=constant",  # whatever the number of steps
            "train.warmup_steps=1",
            "data.captions.dropout=0.3",
            "data.mask_dropout=0.2",
            f"validation.every_steps={STEPS}",
            "validation.images=2",
            f"checkpoint.every_steps={HALF}",
            "logging.trackers=[]",
        ]
        run_ranks(engine, num_processes, train, ["--config", str(path), f"run.name={name}", *quick, *overrides])
        return runs / name

    return run


@pytest.fixture(scope="module")
def cached(launch) -> Path:
    """The run from the cache, of one process."""
    return launch("single", 1, "cached")


@pytest.fixture(scope="module")
def encode_all(tmp_path_factory) -> tuple[str, ...]:
    """What makes a run encode as it trains, with no shard in data.cache that it could read."""
    return (*ONLINE, f"data.cache={tmp_path_factory.mktemp('nothing') / 'cache'}")


@pytest.fixture(scope="module")
def online(launch, encode_all) -> Path:
    """The same run, encoding as it trains."""
    return launch("single", 1, "online", *encode_all)


def read_losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def test_losses_are_those_of_the_cached_run(cached, online):
    losses = read_losses(cached)
    assert max(losses) - min(losses) > 0.01, "steps that all had the same loss would show nothing"
    assert read_losses(online) == pytest.approx(losses, abs=1e-5)


def test_validation_has_the_figures_of_the_cached_run(cached, online):
    one, other = ((run / "validation.jsonl").read_text(encoding="utf-8").splitlines() for run in (online, cached))
    assert len(one) == len(other) == 2
    for line, expected in zip(map(json.loads, one), map(json.loads, other), strict=True):
        for split in ("holdout", "train"):
            assert line[split] == pytest.approx(expected[split], abs=1e-3), split
            assert line[split]["items"] == 2


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_several_ranks_encode_their_own_rows(launch, cached, encode_all, engine):
    """Each has all weights of the text encoders, though transformers takes part in FSDP's and ZeRO-3's loading."""
    run = launch(engine, 2, f"online-{engine}", *encode_all)
    assert read_losses(run) == pytest.approx(read_losses(cached), abs=1e-5)


@pytest.mark.parametrize("name", ["to-online", "to-cached"])
def test_a_run_goes_on_in_the_other_mode(launch, cached, encode_all, name):
    first, then = ((), encode_all) if name == "to-online" else (encode_all, ())
    launch("single", 1, name, *first, f"train.steps={HALF}")
    run = launch("single", 1, name, *then)
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    assert read_losses(run) == pytest.approx(read_losses(cached), abs=1e-5)


def test_a_run_reads_the_finished_shards_of_its_cache(launch, config, cached, tmp_path):
    """Every other one is there, of a preprocessing job that was stopped."""
    cache = tmp_path / "cache"
    shutil.copytree(config.data.cache, cache)
    (cache / "manifest.json").unlink()
    for tar in sorted(cache.rglob("*.tar"))[::2]:
        tar.unlink()
    run = launch("single", 1, "half-there", *ONLINE, f"data.cache={cache}")
    assert read_losses(run) == pytest.approx(read_losses(cached), abs=1e-5)


def test_what_is_wrong_with_pictures_is_told_by_every_rank_before_a_model_is_loaded(launch, triples, tmp_path):
    (tmp_path / "mask").mkdir()
    with pytest.raises(RankFailure, match=rf"InputError: .*{tmp_path}/mask"):
        launch("ddp", 2, "no-masks", *ONLINE, f"data.datasets.0.mask={tmp_path / 'mask'}")
    with pytest.raises(RankFailure, match=r"InputError: data\.encoder_devices names cuda:99"):
        launch("single", 1, "no-device", "data.mode=online", "data.encoder_devices=[cuda:99]")
