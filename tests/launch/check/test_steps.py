"""Two steps by the trainer itself (slow), and what is said of steps and failures that a script stands in for."""

import sys
import tempfile
from pathlib import Path

import pytest

from launch.check.model import check_model
from launch.check.pictures import check_pictures
from launch.check.steps import Step, check_steps, judge_steps

TRAINER = """\
import json, os, pathlib, sys
arguments = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
run = pathlib.Path(json.loads(arguments["run.dir"])) / arguments["run.name"]
print("last words", file=sys.stderr)
if REASON:
    pathlib.Path(os.environ["FLUXFILL_OUTCOME"]).write_text(json.dumps({"code": CODE, "reason": REASON, "step": None}))
    sys.exit(CODE)
run.mkdir(parents=True)
lines = [{"loss": 0.5, "seconds": 9.0, "peak_memory_gib": 20.25}, {"loss": LOSS, "seconds": 1.5, "peak_memory_gib": 21}]
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder in which temporary ones are made."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def train(situate, progress, monkeypatch, temporary):
    """The check of a trainer that ends so: `train(reason, code, loss)`."""

    def run(reason="", code=0, loss=0.4):
        program = TRAINER.replace("REASON", repr(reason)).replace("CODE", str(code)).replace("LOSS", repr(loss))
        monkeypatch.setattr(
            "launch.check.steps.render_command",
            lambda config, overrides, *_, **__: [sys.executable, "-c", program, *overrides],
        )
        (made,) = check_steps(situate(), None, progress, cache_can_be_read=True)
        assert list(temporary.iterdir()) == []
        return made

    return run


def test_seconds_memory_and_losses_are_told(train):
    made = train()
    assert made.state == "ok"
    assert made.what == "2 steps, the last in 1.5 s, 21.0 GiB of a GPU at most; loss 0.5000, 0.4000"


def test_a_loss_that_is_not_finite_is_an_error(train):
    made = train(loss=None)
    assert made.state == "error" and "loss 0.5000, not finite" in made.what and "train.lr" in made.cure


def test_a_failure_is_told_in_the_trainers_words_with_its_last_lines(train):
    made = train("data.streams is 4, but batches have 2 rows. Lower it.", 2)
    assert made.state == "error" and made.what == "training failed: data.streams is 4, but batches have 2 rows"
    assert made.cure == "Lower it." and "last words" in made.found


def test_too_little_memory_says_what_takes_less(train):
    assert "train.micro_batch_size" in train("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", 1).cure


def test_being_stopped_ends_all_checks_and_leaves_nothing(train, temporary):
    with pytest.raises(KeyboardInterrupt):
        train("stopped by SIGINT after step 1; resumable", 75)
    assert list(temporary.iterdir()) == []


def test_a_temporary_folder_that_takes_nothing_is_named(situate, progress, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    (made,) = check_steps(situate(), None, progress, cache_can_be_read=True)
    assert made.state == "error" and made.what.startswith("/proc/fluxfill-check-")
    assert "/proc" in made.cure and "TMPDIR" in made.cure


def test_steps_without_a_gpu_have_no_memory():
    assert "GiB" not in judge_steps([Step(1.0, 1.0, None)]).what


@pytest.mark.slow
@pytest.mark.parametrize("method", ["{type: full}", "{type: lora, rank: 2}"])
def test_two_steps_run_on_a_few_pictures_and_leave_nothing(method, situate, folder, progress, temporary):
    situation = situate(f"method={method}", "data.captions.dropout=0.5")
    before = {path for path in folder.rglob("*") if temporary not in path.parents}
    pictures, _ = check_pictures(situation, progress)
    (made,) = check_steps(situation, pictures, progress, cache_can_be_read=False)
    assert made.state == "ok" and "2 steps" in made.what, made
    assert list(temporary.iterdir()) == [] and not (folder / "runs").exists()
    assert {path.name for path in folder.iterdir()} - {path.name for path in before} == {"cache"}
    assert [path.name for path in (folder / "cache").iterdir()] == ["scan"]


@pytest.mark.slow
def test_two_steps_run_on_a_finished_cache_that_stays_as_it_is(cache, triples, situate, progress, temporary):
    places = [f"data.datasets.0.{role}={triples / role}" for role in ("target", "source", "mask")]
    situation = situate("data.holdout=48", f"data.cache={cache.folder}", *places)
    before = {path: path.stat().st_mtime_ns for path in cache.folder.rglob("*")}
    assert check_model(Path(situation.config.model.base))[0] is not None
    (made,) = check_steps(situation, None, progress, cache_can_be_read=True)
    assert made.state == "ok", made
    assert {path: path.stat().st_mtime_ns for path in cache.folder.rglob("*")} == before


@pytest.mark.slow
def test_a_config_that_ends_in_its_first_step_is_found(situate, progress, temporary):
    situation = situate("data.mode=online", "data.streams=3")
    (made,) = check_steps(situation, None, progress, cache_can_be_read=False)
    assert made.state == "error" and "data.streams" in made.what and made.cure
