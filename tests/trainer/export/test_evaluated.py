import json
import logging

import pytest

from trainer.export.evaluated import best_evaluated, read_evaluation, render_scores

FOUND = {
    "version": 1,
    "weights": "live",
    "against": "base",
    "steps": {"base": None, "step 3": 3, "step 6": 6},
    "pictures": [
        {"key": "a", "scores": {label: {"hole_psnr": value, "seam": None} for label, value in each.items()}}
        for each in ({"base": 10.0, "step 3": 20.0, "step 6": 21.0}, {"base": 11.0, "step 3": 22.0, "step 6": 25.0})
    ],
    "best": {"by": "hole_psnr", "step": "step 6", "says": []},
}


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        (tmp_path / "evaluation" / "evaluation.json").write_text(text)
        return tmp_path

    return write


def test_a_steps_scores_stand_beside_those_of_the_base(write):
    run = write(json.dumps(FOUND))
    assert best_evaluated(run, "live") == 6
    lines = render_scores(run, 3, "live").splitlines()
    assert lines[0] == "| mean of 2 pictures | base | step 3 |"
    assert lines[2:] == ["| hole_psnr | 10.5 | 21 |", "| seam |  |  |"]
    assert render_scores(run, 4, "live") == ""


@pytest.mark.parametrize("evaluated", ["live", "ema", None])
@pytest.mark.parametrize("exported", ["live", "ema"])
def test_scores_and_best_step_are_those_of_the_weights_that_are_exported(
    write, caplog, monkeypatch, evaluated, exported
):
    """None: noted by an earlier fluxfill, which did not say."""
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    run = write(
        json.dumps(
            {name: value for name, value in FOUND.items() if name != "weights"}
            | ({"weights": evaluated} if evaluated else {})
        )
    )
    is_taken = evaluated == exported
    assert best_evaluated(run, exported) == (6 if is_taken else None)
    assert bool(render_scores(run, 3, exported)) == is_taken
    told = f"left out, it is of {evaluated or 'unknown'} weights. For those of this export: fluxfill evaluate {run} "
    assert (f"{told}--weights {exported}" in caplog.text) == (not is_taken)


def test_of_a_step_that_was_not_evaluated_nothing_is_left_out(write, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    assert (render_scores(write(json.dumps(FOUND)), 4, "ema"), caplog.text) == ("", "")


def test_a_run_that_was_not_evaluated_has_none(tmp_path):
    assert read_evaluation(tmp_path) is None and best_evaluated(tmp_path, "live") is None
    assert render_scores(tmp_path, 3, "live") == ""


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2, "best": {"step": 3}}'])
def test_what_is_no_evaluation_of_this_version_is_left_out_and_told(write, caplog, monkeypatch, text):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    run = write(text)
    assert (best_evaluated(run, "live"), render_scores(run, 3, "live")) == (None, "")
    assert "evaluation.json: left out" in caplog.text


@pytest.mark.parametrize("best", [None, {}, {"step": None}])
def test_an_evaluation_may_find_none_best(write, best):
    assert best_evaluated(write(json.dumps(FOUND | {"best": best})), "live") is None
