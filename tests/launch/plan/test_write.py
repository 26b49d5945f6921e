"""A plan written into the config that it is of."""

import shutil
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.flux_shape import FluxShape
from configs.gpu_profiles import load_gpu_profile
from configs.loading import load_config
from configs.plan import Cluster, Plan, plan_run
from configs.schema import Config
from launch.command import REPO_ROOT
from launch.plan.asked import sample_tokens
from launch.plan.write import write_plan


def planned(path: Path, *overrides: str) -> tuple[Config, Plan]:
    config = load_config(path, overrides)
    cluster = Cluster(load_gpu_profile("h100-80gb"), 1, 8)
    best = plan_run(config, FluxShape(), cluster, tokens=sample_tokens(config)).best
    assert best is not None
    return config, best


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return Path(shutil.copy(REPO_ROOT / "configs" / "fill_full.yaml", tmp_path / "mine.yaml"))


def test_overrides_are_written_with_the_plan_that_is_of_them(full):
    """With a section that the file lacks, an entry of a list, and a key given twice, whose last value counts."""
    overrides = ["train.ema_decay=null", "train.optimizer=adamw", "slurm.nodes=2", "data.datasets.0.weight=2.5"]
    overrides += ["run.name=first", "run.name=second"]
    config, best = planned(full, *overrides)
    write_plan(full, overrides, config, best)
    written = load_config(full)
    assert written.train.ema_decay is None and written.train.optimizer == "adamw" and written.slurm.nodes == 2
    assert written.data.datasets[0].weight == 2.5 and written.run.name == "second"
    assert (written.parallel.engine, written.train.micro_batch_size, written.train.activation_checkpointing) == (
        best.engine,
        best.micro_batch_size,
        (best.checkpointed == best.blocks or best.checkpointed),
    )
    assert planned(full)[1] == best  # the file is what was planned


def test_line_ends_and_comments_stay(full):
    full.write_bytes(full.read_bytes().replace(b"\n", b"\r\n"))
    before = full.read_text()
    config, best = planned(full, "train.lr=3e-5")
    write_plan(full, ["train.lr=3e-5"], config, best)
    assert b"\n" not in full.read_bytes().replace(b"\r\n", b"")
    comments = [
        [line for line in text.splitlines() if line.lstrip().startswith("#")] for text in (before, full.read_text())
    ]
    assert comments[0] == comments[1] != []


def test_a_comment_goes_with_the_value_that_it_was_of(full):
    text = full.read_text().replace("model:\n", "model:\n  precision: auto # not quantised: 51.8 of 80 GiB\n", 1)
    text = text.replace("  resolution:", "  mask_choice: first # the best\n  resolution:", 1)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("micro_batch_size", "resolution:"))]
    place = next(number for number, line in enumerate(lines) if line.startswith("train:"))
    lines[place + 1 : place + 1] = ["  micro_batch_size: 33 # as many as fit"]
    place = next(number for number, line in enumerate(lines) if line.startswith("data:"))
    lines[place + 1 : place + 1] = ["  resolution: [512, 1024] # two '#' of them", "  encoders: {t5: auto} # fast"]
    full.write_text("\n".join(lines) + "\n")
    overrides = ["model.precision=bf16", "data.resolution.1=768", "data.encoders.t5=cpu", "data.mask_choice=first"]
    config, best = planned(full, *overrides)
    write_plan(full, overrides, config, best)
    written = full.read_text()
    assert "  precision: bf16\n" in written and f"  micro_batch_size: {best.micro_batch_size}\n" in written
    assert "  resolution: [512, 768]\n" in written and "  encoders: {t5: cpu}\n" in written
    assert "  mask_choice: first # the best\n" in written  # as it was


@pytest.mark.parametrize(
    "override, changes",
    [
        # The anchor would be overwritten, and its alias mean nothing.
        ("train.steps=5000", [("steps: 20000", "steps: &often 20000"), ("every_steps: 1000", "every_steps: *often")]),
        # The section is an alias: its keys are another section's.
        ("validation.every_steps=7", [("checkpoint:", "checkpoint: &often"), ("\n  every_steps: 1000", " *often")]),
    ],
)
def test_a_value_that_an_alias_shares_is_not_changed_behind_the_users_back(full, override, changes):
    text = full.read_text().replace(
        "  keep_last: 2 # each holds the weights, their average and the optimizer's state\n", ""
    )
    before, _, checkpoint = text.partition("checkpoint:")
    validation = before[before.index("validation:") :]
    text = before.replace(validation, f"checkpoint:{checkpoint}{validation}")  # an anchor stands before its alias
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    full.write_text(text)
    config, best = planned(full, override)
    with pytest.raises(InputError, match=r"by hand"):
        write_plan(full, [override], config, best)
    assert full.read_text() == text and list(full.parent.iterdir()) == [full]
