"""Figures of a fill: PSNR, seam, colour.  Pictures are fp32 [3, H, W] in [0, 1], masks bool [H, W], True = hole."""

import math

import torch
from torch import Tensor


def psnr(picture: Tensor, target: Tensor, where: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over the pixels of a region; 100 dB at most (equal pictures)."""
    error = (picture - target)[:, where].double().square().mean().item()
    return -10 * math.log10(max(error, 1e-10))


def hole_psnr(fill: Tensor, target: Tensor, mask: Tensor) -> float:
    """PSNR inside the hole."""
    return psnr(fill, target, mask)


def keep_psnr(fill: Tensor, image: Tensor, mask: Tensor) -> float:
    """PSNR outside the hole, before paste-back: how well the model repeats what it was shown."""
    return psnr(fill, image, ~mask)


def paste_back(fill: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """The fill inside the hole, the picture outside: what a user of an inpainting model keeps."""
    return torch.where(mask, fill, image)


def seam_error(pasted: Tensor, target: Tensor, mask: Tensor) -> float:
    """Mean difference of the steps across the hole's edge: |step in the pasted picture - step in the target|, over all
    pairs of neighbours of which one is in the hole; 0 = no visible seam."""
    total, count = 0.0, 0
    for dim in (1, 2):
        crosses = torch.diff(mask.int(), dim=dim - 1) != 0
        steps = (torch.diff(pasted, dim=dim) - torch.diff(target, dim=dim))[:, crosses]
        total += steps.abs().sum().item()
        count += steps.numel()
    return total / count if count else 0.0


def color_shift(pasted: Tensor, target: Tensor, mask: Tensor) -> float:
    """Distance between the mean colours of fill and target inside the hole, 0 to sqrt(3)."""
    return (pasted[:, mask].mean(dim=1) - target[:, mask].mean(dim=1)).norm().item()
