import shutil
from collections import namedtuple

import pytest

from configs.flux_shape import FluxShape
from launch.check.disk import check_disk, most_checkpoints

Usage = namedtuple("Usage", "total used free")
LORA = "method={type: lora}"


def free(gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(2**50, 0, int(gib * 2**30)))


@pytest.mark.parametrize("gib, state", [(1000, "ok"), (420, "warning"), (390, "error")])
def test_checkpoints_and_export_are_held_against_what_is_free(gib, state, situate, monkeypatch):
    """Of a full fine-tune with adamw and an average: 16 bytes a parameter twice, and final/ and final-ema/ in bf16."""
    free(gib, monkeypatch)
    situation = situate("train.steps=20", "checkpoint.every_steps=10", "checkpoint.keep_last=1", "train.ema_decay=0.9")
    (made,) = check_disk(situation, FluxShape(), 0)
    assert made.state == state, made.what
    assert "2 x 177.4 GiB of checkpoints, final/ of 44.3 GiB" in made.what or state != "ok"


def test_what_is_on_one_disk_is_added_up(situate, monkeypatch):
    free(1000, monkeypatch)
    (made,) = check_disk(situate(LORA), FluxShape(), 5 * 2**30)
    assert "checkpoints" in made.what and "shards of 5.0 GiB" in made.what


@pytest.mark.parametrize(
    "overrides, count",
    [
        (
            ["train.steps=1000", "checkpoint.every_steps=10", "checkpoint.keep_last=3"],
            5,
        ),  # three, the best one, and one in work
        (["train.steps=1000", "checkpoint.every_steps=10", "checkpoint.keep_last=3", "checkpoint.keep_best=null"], 4),
        (["train.steps=1000", "checkpoint.every_steps=10", "checkpoint.keep_last=null"], 100),
        (["train.steps=20", "checkpoint.every_steps=null"], 1),
        (["train.steps=20", "checkpoint.every_steps=null", "checkpoint.every_minutes=5", "checkpoint.keep_last=3"], 5),
        (["train.steps=20", "checkpoint.every_steps=null", "checkpoint.at_end=false"], 0),
    ],
)
def test_checkpoints_that_lie_beside_each_other_are_counted(overrides, count, situate):
    assert most_checkpoints(situate(*overrides)) == count


def test_an_adapter_needs_little(situate, monkeypatch):
    free(20, monkeypatch)
    (made,) = check_disk(situate(LORA), FluxShape(), 0)
    assert made.state == "ok"
