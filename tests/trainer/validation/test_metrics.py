"""Figures on pictures made by hand, whose answers can be counted."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from trainer.validation.metrics import color_shift, hole_psnr, keep_psnr, paste_back, psnr, seam_error


@pytest.fixture
def target() -> torch.Tensor:
    return torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[3:9, 5:15] = True
    return mask


@pytest.mark.parametrize("error, expected", [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (0.5, 20 * math.log10(2))])
def test_psnr_of_a_constant_error(target, error, expected):
    everywhere = torch.ones(12, 20, dtype=torch.bool)
    assert psnr(target + error, target, everywhere) == pytest.approx(expected, abs=1e-4)


def test_psnr_is_scikit_images(target):
    other = (target + 0.1 * torch.randn(target.shape)).clamp(0, 1)
    everywhere = torch.ones(12, 20, dtype=torch.bool)
    expected = peak_signal_noise_ratio(target.numpy(), other.numpy(), data_range=1)
    assert psnr(other, target, everywhere) == pytest.approx(expected, abs=1e-4)


def test_psnr_of_equal_pictures_is_a_hundred(target):
    assert psnr(target, target, torch.ones(12, 20, dtype=torch.bool)) == 100


def test_hole_and_kept_part_are_measured_apart(target, mask):
    fill = target.clone()
    fill[:, mask] += 0.1
    fill[:, ~mask] -= 0.01
    assert hole_psnr(fill, target, mask) == pytest.approx(20, abs=1e-3)
    assert keep_psnr(fill, target, mask) == pytest.approx(40, abs=1e-2)


def test_paste_back_takes_the_fill_in_the_hole_only(target, mask):
    fill = 1 - target
    pasted = paste_back(fill, target, mask)
    assert torch.equal(pasted[:, mask], fill[:, mask])
    assert torch.equal(pasted[:, ~mask], target[:, ~mask])


def test_the_target_itself_has_no_seam_and_no_shift(target, mask):
    assert seam_error(target, target, mask) == 0
    assert color_shift(target, target, mask) == 0


def test_a_brighter_fill_has_a_seam_of_its_own_height(target, mask):
    pasted = target.clone()
    pasted[:, mask] += 0.25
    assert seam_error(pasted, target, mask) == pytest.approx(0.25, abs=1e-6)


def test_seam_counts_every_pair_across_the_edge_and_no_other(mask):
    """A ramp from left to right inside the hole: steps of other sizes at its four sides, known by counting."""
    target = torch.zeros(3, 12, 20)
    pasted = target.clone()
    ramp = torch.arange(10) / 10  # columns 5 to 14
    pasted[:, 3:9, 5:15] = ramp
    # left side 6 pairs of 0.0, right side 6 of 0.9, top and bottom 10 each with 0.0 to 0.9
    expected = (6 * 0.0 + 6 * 0.9 + 2 * ramp.sum().item()) / (6 + 6 + 20)
    assert seam_error(pasted, target, mask) == pytest.approx(expected, abs=1e-6)


def test_what_happens_away_from_the_edge_is_no_seam(target, mask):
    pasted = target.clone()
    pasted[:, 5:7, 8:12] = 0  # inside the hole
    pasted[:, 0, :] = 1  # in the kept part
    assert seam_error(pasted, target, mask) == 0


def test_a_hole_that_touches_the_border_has_no_seam_there(target):
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[:, :7] = True
    pasted = target.clone()
    pasted[:, mask] += 0.5
    assert seam_error(pasted, target, mask) == pytest.approx(0.5, abs=1e-6)
    assert seam_error(pasted, target, torch.ones_like(mask)) == 0  # no edge at all


def test_color_shift_is_the_distance_of_the_mean_colours(target, mask):
    pasted = target.clone()
    shift = torch.tensor([0.03, -0.04, 0.12])
    pasted[:, mask] += shift[:, None]
    pasted[:, ~mask] = 0  # does not count
    assert color_shift(pasted, target, mask) == pytest.approx(0.13, abs=1e-6)
    rearranged = target.clone()
    rearranged[:, mask] = target[:, mask].flip(1)
    assert color_shift(rearranged, target, mask) == pytest.approx(0, abs=1e-6)


def test_a_diverged_fill_gives_nan_and_no_error(target, mask):
    fill = torch.full_like(target, float("nan"))
    figures = [f(fill, target, mask) for f in (hole_psnr, keep_psnr, seam_error, color_shift)]
    assert np.isnan(figures).all()
