import re

import numpy as np
import pytest

from trainer.evaluation.compare import Contender, compare, judge, say_verdict, show

FRACTIONS = [0.05] * 6 + [0.2] * 6


def contender(label: str, step: int | None, psnr: float, detail: float = 0.9, *, noise: float = 0.1) -> Contender:
    random = np.random.default_rng(step or 0)
    scores = [
        {"hole_psnr": psnr + number + random.normal(0, noise), "detail": detail, "loss": 1 / psnr}
        for number in range(12)
    ]
    return Contender(label, step, scores)


CONTENDERS = [contender("base", None, 12), contender("step 1", 1, 18, 0.95), contender("step 2", 2, 18.02, 1.3)]


def test_scores_are_held_against_the_first_and_higher_gains_are_better_whatever_the_score():
    tables = compare(CONTENDERS, FRACTIONS, against="base")
    assert tables.keys() == {"hole_psnr", "detail", "loss"}
    assert tables["hole_psnr"].gains["step 1"].mean == pytest.approx(6, abs=0.2)
    assert tables["loss"].gains["step 1"].mean > 0  # lower, so better
    assert tables["detail"].gains["step 1"].mean > 0 > tables["detail"].gains["step 2"].mean  # best at 1
    assert "base" not in tables["loss"].gains


def test_pictures_are_split_by_the_size_of_their_hole():
    sizes = compare(CONTENDERS, FRACTIONS, against="base")["hole_psnr"].by_hole_size
    assert [*sizes] == ["0% to 10%", "10% to 30%"]
    assert [means["step 1"].n for means in sizes.values()] == [6, 6]
    assert sizes["0% to 10%"]["step 1"].mean < sizes["10% to 30%"]["step 1"].mean


def test_the_best_step_is_named_and_what_is_noise_is_called_so():
    tables = compare(CONTENDERS, FRACTIONS, against="base")
    verdict = judge(CONTENDERS, "hole_psnr")
    said = say_verdict(verdict, tables)
    other = {"step 1": "step 2", "step 2": "step 1"}[verdict.best]
    assert said[0].startswith(f"{verdict.best} is best by PSNR in the hole")
    assert "over 12 pictures" in said[0]
    assert any("better than base by" in line and "more than noise" in line for line in said)
    assert any(f"cannot be told from {other}" in line for line in said)


@pytest.mark.parametrize("count, told", [(1, "1 picture cannot tell"), (2, "2 pictures cannot tell")])
def test_too_few_pictures_are_said_to_be_too_few_and_not_noise(count, told):
    few = [Contender(each.label, each.step, each.scores[:count]) for each in CONTENDERS]
    said = say_verdict(judge(few, "hole_psnr"), compare(few, FRACTIONS[:count], against="base"))
    assert told in said[1] and "cannot be told from base (6." in said[1] and "noise" not in said[1]


def test_a_run_that_made_it_worse_is_told_so():
    worse = [contender("base", None, 20), contender("step 1", 1, 18), contender("step 2", 2, 17)]
    said = say_verdict(judge(worse, "hole_psnr"), compare(worse, FRACTIONS, against="base"))
    assert any(
        re.search(r"worse than base by (1\.9|2\.0)\d \[1\.\d+, 2\.\d+\] dB", line) and "more than noise" in line
        for line in said
    )
    assert any("better than step 2" in line for line in said)


def test_the_base_is_no_step_to_be_chosen():
    assert judge([contender("base", None, 30), contender("step 1", 1, 18)], "hole_psnr").best == "step 1"


def test_a_score_that_a_picture_lacks_is_compared_over_the_others():
    """Of a picture that is all hole nothing outside is scored."""
    some = [Contender(each.label, each.step, [dict(scores) for scores in each.scores]) for each in CONTENDERS]
    for each in some:
        del each.scores[0]["loss"]
    tables = compare(some, FRACTIONS, against="base")
    assert tables["loss"].means["base"].n == 11 and tables["hole_psnr"].means["base"].n == 12


@pytest.mark.parametrize("value, text", [(24.46, "24.5"), (2.171, "2.17"), (0.04712, "0.047"), (-0.5, "-0.500")])
def test_figures_have_three_digits_or_so(value, text):
    assert show(value) == text
