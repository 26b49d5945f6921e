"""A fault of each kind, planted in real photographs, is caught by the score that is meant for it."""

import numpy as np
import pytest
import torch

from tests.trainer.evaluation.photographs import PLACES, blurred, hole, in_hole, photograph, tinted
from trainer.evaluation.scores import SCORES, ciede2000, detail, flip, measure, ring_of, ssim, unpainted

PHOTOGRAPHS = [*PLACES]


def scores_of(name: str, fill) -> dict[str, float]:
    """Of a fill that is right but for `fill(picture)`, which stands in the hole."""
    target = photograph(name)
    return measure(in_hole(fill(target), target), target, target, hole())


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_perfect_fill_is_perfect_by_every_score(name):
    found = scores_of(name, lambda picture: picture)
    assert found["hole_psnr"] == found["keep_psnr"] == 100
    assert found["hole_ssim"] == pytest.approx(1) and found["keep_ssim"] == pytest.approx(1)
    assert found["detail"] == 1
    zero = ("hole_ciede2000", "keep_ciede2000", "seam_error", "color_shift", "unpainted")
    assert all(found[score] == pytest.approx(0, abs=1e-6) for score in zero)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_colour_cast_is_caught_by_the_colour_shift(name):
    """And not by the detail, which is all there."""
    cast, blur = scores_of(name, lambda p: tinted(p, 0.1)), scores_of(name, lambda p: blurred(p, 3))
    assert cast["color_shift"] > 0.08
    assert cast["color_shift"] > 5 * blur["color_shift"]
    assert abs(np.log2(cast["detail"])) < 0.3
    assert cast["hole_ciede2000"] > 3


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_seam_is_caught_by_the_seam_error_and_hardly_by_the_mean_over_the_hole(name):
    """A rim of two pixels, a tenth brighter: a line around the hole, which is right within."""

    def with_rim(picture):
        inner = torch.zeros_like(hole())
        inner[38:90, 38:90] = True
        return torch.where(hole() & ~inner, (picture + 0.15).clamp(0, 1), picture)

    seam, cast = scores_of(name, with_rim), scores_of(name, lambda p: (p + 0.03).clamp(0, 1))
    assert seam["seam_error"] > 2.5 * cast["seam_error"]
    assert seam["color_shift"] < cast["color_shift"]
    assert seam["hole_psnr"] > 24  # which a user would call good


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_blur_is_caught_by_the_detail_where_psnr_praises_it(name):
    """Against noise of the same size: the full-reference score cannot tell them apart, the detail can."""
    blur = scores_of(name, lambda p: blurred(p, 2))
    size = 10 ** (-blur["hole_psnr"] / 20)
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, size, (3, 128, 128))).float()
    noisy = scores_of(name, lambda p: p + noise)
    assert abs(blur["hole_psnr"] - noisy["hole_psnr"]) < 0.5
    assert blur["detail"] < 0.5 and noisy["detail"] > 1.2
    goodness = SCORES["detail"].goodness(np.array([blur["detail"], 1.0, noisy["detail"]]))
    assert goodness.argmax() == 1


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_copy_of_the_masked_input_is_caught_as_unpainted(name):
    """Outside it is perfect, and so is most of the picture."""
    copied = scores_of(name, lambda p: torch.full_like(p, 0.5))
    assert copied["unpainted"] > 0.95 and copied["keep_psnr"] == 100
    assert copied["hole_psnr"] < 20
    for fill in (lambda p: p, lambda p: blurred(p, 3), lambda p: tinted(p, 0.1)):
        assert scores_of(name, fill)["unpainted"] < 0.05


def test_what_is_grey_in_the_target_too_is_not_unpainted():
    wall = torch.full((3, 128, 128), 0.5)
    assert unpainted(wall, wall, hole()) == 0


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("score", [ssim, ciede2000, flip])
def test_a_score_of_a_region_is_blind_to_the_rest(name, score):
    """Where it looks at neighbours, a few pixels beside it count."""
    target, far = photograph(name), ring_of(hole(), 34) & ~ring_of(hole(), 22)
    if (clean := score(target, target, hole())) is None:
        pytest.skip("flip-evaluator is not installed")
    elsewhere = torch.where(far, 1 - target, target)
    assert score(elsewhere, target, hole()) == pytest.approx(clean, abs=5e-3)
    assert score(elsewhere, target, far) != pytest.approx(clean, abs=5e-2)


def test_flip_grows_with_the_fault():
    pytest.importorskip("flip_evaluator")
    target = photograph("coffee")
    found = [flip(blurred(target, sigma), target, hole()) for sigma in (0.5, 1, 2, 4)]
    assert found == sorted(found) and found[0] < found[-1] / 2


def test_where_all_is_hole_nothing_outside_is_scored():
    target = photograph("coffee")
    found = measure(blurred(target, 1), target, target, torch.ones(128, 128, dtype=torch.bool))
    assert not any(name.startswith("keep_") for name in found) and np.isfinite(list(found.values())).all()


def test_a_plain_wall_has_no_detail_to_miss():
    wall = torch.full((3, 128, 128), 0.7)
    assert detail(wall, wall, hole()) == 1


def test_every_score_has_a_word_on_what_it_says():
    assert all(len(score.says) > 20 and score.title for score in SCORES.values())
    measured = scores_of("coffee", lambda p: blurred(p, 1))
    assert measured.keys() <= SCORES.keys()
