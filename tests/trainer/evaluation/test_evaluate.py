import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data.storage.small_disk import open_small_disk
from trainer.checkpoints.tensor_files import StateFiles
from trainer.evaluation import evaluate as module
from trainer.evaluation.evaluate import main
from trainer.evaluation.intervals import Interval
from trainer.evaluation.scores import SCORES
from trainer.evaluation.tuned_model import TunedModel
from trainer.export.evaluated import best_evaluated
from trainer.validation.sampler import Sampler


def evaluate(capsys, run: Path, out: Path, *options: str) -> tuple[dict, str]:
    """(evaluation.json, what was said) of a short evaluation."""
    assert main([str(run), "--out", str(out), "--images", "3", "--sampler-steps", "1", *options]) == 0
    return json.loads((out / "evaluation.json").read_text(encoding="utf-8")), capsys.readouterr().out


def interval(found: dict, score: str, label: str) -> Interval:
    return Interval(**found["scores"][score]["means"][label])


def test_every_checkpoint_is_held_against_the_base_over_the_same_pictures(train_run, tmp_path, capsys):
    found, said = evaluate(capsys, train_run("lora"), tmp_path, "--data", "train")
    assert found["steps"] == {"base": None, "step 1": 1, "step 2": 2} and found["against"] == "base"
    assert found["scores"].keys() <= SCORES.keys() and "reinpaint_psnr" in found["scores"]
    assert {name for name in SCORES if name.startswith("loss")} <= found["scores"].keys()
    for score in found["scores"].values():
        assert {mean["n"] for mean in score["means"].values()} == {3}
        assert score["gains"].keys() == {"step 1", "step 2"}
    assert len(found["pictures"]) == 3 and 0 < found["pictures"][0]["hole_fraction"] < 1
    assert found["best"]["step"] in ("step 1", "step 2") and found["best"]["says"][0] in said
    assert str(tmp_path / "evaluation.html") in said
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert all(picture["key"] in page for picture in found["pictures"])
    shutil.copytree(tmp_path, tmp_path / "run" / "evaluation", ignore=shutil.ignore_patterns("run"))
    assert f"step {best_evaluated(tmp_path / 'run', 'live')}" == found["best"]["step"]
    assert any("LPIPS, CLIP score and ReMOVE need weights" in line for line in found["left_out"])


def test_a_step_and_an_average_and_the_deciding_score_are_those_asked_for(train_run, tmp_path, capsys):
    run = train_run("full")
    options = ("--step", "2", "--by", "loss", "--no-consistency", "--data", "train")
    live, _ = evaluate(capsys, run, tmp_path / "live", *options)
    ema, _ = evaluate(capsys, run, tmp_path / "ema", "--weights", "ema", *options)
    assert live["steps"] == {"base": None, "step 2": 2} and "reinpaint_psnr" not in live["scores"]
    assert live["best"]["by"] == "loss" and (live["weights"], ema["weights"]) == ("live", "ema")
    assert "(train; ema weights)" in (tmp_path / "ema" / "evaluation.html").read_text(encoding="utf-8")
    assert interval(live, "loss", "base") == interval(ema, "loss", "base")
    assert interval(live, "loss", "step 2") != interval(ema, "loss", "step 2")


def test_two_runs_are_compared(train_run, tmp_path, capsys):
    options = ("--step", "2", "--against", str(train_run("lora")), "--no-consistency", "--data", "holdout")
    found, said = evaluate(capsys, train_run("full"), tmp_path, *options)
    assert found["steps"] == {"lora": None, "step 2": 2} and found["against"] == "lora"
    assert "step 2 is best" in said and "lora" in said


def test_an_export_beside_the_run_is_sampled_in_as_many_steps(train_run, config, tmp_path, monkeypatch):
    """Which it does not say itself: no config lies beside it here."""
    shutil.copytree(train_run("lora") / "final", tmp_path / "export")
    taken = []
    plain = Sampler.__init__
    monkeypatch.setattr(
        Sampler, "__init__", lambda self, *given, **by: (taken.append(by["steps"]), plain(self, *given, **by))[1]
    )
    options = ["--step", "2", "--images", "1", "--no-consistency", "--base", config.model.base]
    run = train_run("full", "validation.sampler_steps=3", name="three-steps")
    assert main([str(run), "--out", str(tmp_path / "out"), "--against", str(tmp_path / "export"), *options]) == 0
    assert taken == [3, 3]


def test_a_folder_of_triples_is_evaluated_as_the_caches_own_pictures_are(train_run, config, tmp_path, capsys):
    """The same files, encoded here: the scores are the same up to the cache's rounding."""
    run = train_run("full")
    options = ("--step", "2", "--no-consistency")
    cached, _ = evaluate(capsys, run, tmp_path / "cached", "--data", "holdout", *options)
    names = {picture["key"].rpartition("-")[0]: picture for picture in cached["pictures"]}
    for role in ("target", "mask", "source"):
        (tmp_path / "mine" / role).mkdir(parents=True)
        for path in Path(getattr(config.data.datasets[0], role)).iterdir():
            if path.stem in names:
                (tmp_path / "mine" / role / path.name).write_bytes(path.read_bytes())
    own, _ = evaluate(capsys, run, tmp_path / "own", "--data", str(tmp_path / "mine"), *options)
    for picture in own["pictures"]:
        for score in ("loss", "loss_sigma_0.9"):
            # Another name is other noise; of a model that knows nothing yet the loss is nearly the same.
            mine, theirs = (p["scores"]["base"][score] for p in (picture, names[picture["key"]]))
            assert mine == pytest.approx(theirs, rel=0.1)
        assert picture["hole_fraction"] == names[picture["key"]]["hole_fraction"]
        assert picture["caption"] == names[picture["key"]]["caption"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--step", "9"], "has no checkpoint of step 9. There are 1, 2"),
        (["--data", "/nowhere"], "holds no target/ and mask/"),
        (["--against", "/nowhere"], "/nowhere: there is no such file or folder"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(train_run, tmp_path, capsys, options, message):
    assert main([str(train_run("lora")), "--out", str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err
    assert message in " ".join(told.split()) and "Traceback" not in told and not (tmp_path / "out").exists()


def test_an_average_that_is_not_there_is_told_before_the_base_fills(train_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "TunedModel", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(StateFiles, "kinds", lambda self: {"weight"})
    assert main([str(train_run("lora")), "--out", str(tmp_path / "out"), "--weights", "ema"]) == 2
    assert "Give --weights live" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("other", ["lora", "lora/final"])
def test_an_average_that_the_other_has_not_is_told_before_the_fills(train_run, tmp_path, capsys, monkeypatch, other):
    monkeypatch.setattr(module, "TunedModel", lambda *_: pytest.fail("a model was loaded"))
    run, rival = train_run("full"), train_run("lora").parent / other
    kinds = StateFiles.kinds
    monkeypatch.setattr(StateFiles, "kinds", lambda self: {"weight"} if rival in self._folder.parents else kinds(self))
    assert main([str(run), "--out", str(tmp_path / "out"), "--weights", "ema", "--against", str(rival)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    words = "is an export, which holds one kind (live)" if other == "lora/final" else "Give --weights live"
    assert words in told and str(rival) in told


def test_a_place_that_cannot_be_written_is_told_with_the_option(train_run, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main([str(train_run("lora")), "--out", str(tmp_path / "out")]) == 2
    assert "Give another folder by --out" in " ".join(capsys.readouterr().err.split())


def test_an_export_has_no_steps_to_compare(train_run, capsys):
    assert main([str(train_run("lora") / "final")]) == 2
    assert "an export. Give the run's folder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("named", [False, True])
def test_a_checkpoint_that_the_run_deletes_meanwhile_is_left_out_unless_it_was_asked_for(
    train_run, tmp_path, capsys, caplog, monkeypatch, named
):
    run = tmp_path / "run"
    shutil.copytree(train_run("lora"), run, ignore=shutil.ignore_patterns("final*"))
    load_base = TunedModel.load_base

    def delete_and_load(self):
        shutil.rmtree(run / "checkpoints" / "step-00000001")
        load_base(self)

    monkeypatch.setattr(TunedModel, "load_base", delete_and_load)
    options = ["--out", str(tmp_path / "out"), "--images", "1", "--sampler-steps", "1", "--no-consistency"]
    code = main([str(run), *options, *(["--step", "1", "--step", "2"] if named else [])])
    words = "step-00000001: was deleted while it was read"
    if named:
        assert code == 2 and words in " ".join(capsys.readouterr().err.split())
    else:
        assert code == 0 and words in caplog.text
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
        assert found["steps"] == {"base": None, "step 2": 2}


def test_a_disk_that_fills_up_is_told_with_exit_code_1(train_run, tmp_path, capsys):
    with open_small_disk(tmp_path) as disk:
        options = ["--out", str(disk.folder / "out"), "--images", "1", "--sampler-steps", "1", "--step", "2"]
        with disk.with_room_for(24_576):
            assert main([str(train_run("lora")), "--no-consistency", *options]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert "evaluation.html: cannot be written" in told and "Traceback" not in told
        assert [path.name for path in (disk.folder / "out").iterdir()] == ["evaluation.json"]


def test_a_disk_that_is_full_already_is_told_before_the_fills(train_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "TunedModel", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    assert main([str(train_run("lora")), "--out", str(tmp_path / "out"), "--images", "3"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "evaluation.html: cannot be written (No space left on device). 99 bytes are free there, about" in told


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["nf4", "int8", "fp8"])
def test_an_adapter_is_judged_over_the_quantized_base_that_it_trained_on(train_run, tmp_path, capsys, precision):
    run = train_run("lora", f"model.precision={precision}", "train.lr=1e-2", name=precision)
    found, _ = evaluate(capsys, run, tmp_path, "--data", "train", "--no-consistency", "--by", "loss")
    means = [interval(found, "loss", label).mean for label in ("base", "step 1", "step 2")]
    assert len({*means}) == 3 and all(0.1 < mean < 10 for mean in means)
    exact, _ = evaluate(capsys, train_run("lora"), tmp_path / "exact", "--data", "train", "--no-consistency")
    base = interval(exact, "loss", "base").mean
    assert means[0] != base and means[0] == pytest.approx(base, rel=0.05)


@pytest.mark.slow
def test_untrained_half_trained_and_trained_are_ranked_with_intervals_that_do_not_overlap(train_run, tmp_path, capsys):
    """On pictures that the run trains on: it has too few to learn more than themselves."""
    settings = ["train.steps=160", "train.lr=1e-3", "train.warmup_steps=10", "train.global_batch_size=8"]
    settings += ["train.micro_batch_size=8", "checkpoint.every_steps=40", "checkpoint.keep_last=null"]
    run = train_run("full", *settings, name="learns")
    options = ["--data", "train", "--step", "40", "--step", "160", "--sampler-steps", "6"]
    assert main([str(run), "--out", str(tmp_path), *options]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    for score in ("hole_psnr", "loss"):
        intervals = [interval(found, score, label) for label in ("base", "step 40", "step 160")]
        if SCORES[score].better == "lower":
            intervals = [-each for each in intervals]
        assert all(worse.high < better.low for worse, better in pairwise(intervals)), (score, intervals)
    assert found["best"]["step"] == "step 160"
    said = capsys.readouterr().out
    assert all(f"It is better than {label} by" in said for label in ("base", "step 40"))
    assert said.count("more than noise") == 2
