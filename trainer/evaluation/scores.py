"""Scores of a fill, each for a fault of its own, and what each of them can tell and cannot.

Pictures are fp32 [3, H, W] in [0, 1], masks bool [H, W], True = hole; a region is a mask that says where to look.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor

from trainer.evaluation.perceptual import perceptual
from trainer.validation.metrics import color_shift, hole_psnr, keep_psnr, paste_back, psnr, seam_error
from trainer.validation.sampler import SIGMA_BINS

_GREY = 0.5  # what the model is shown in the hole
_GREY_LEVELS = 4 / 255  # this near to it, in every channel, a pixel counts as left unpainted
_SSIM_WINDOW = 7


@dataclass(frozen=True)
class Score:
    """better: "higher", "lower", or "one": a ratio, best at 1.  says: what it tells, and what it does not."""

    title: str
    unit: str
    better: Literal["higher", "lower", "one"]
    says: str

    def goodness(self, values: np.ndarray) -> np.ndarray:
        """The same values, higher = better: to compare by."""
        if self.better == "one":
            return -np.abs(np.log2(np.maximum(values, 1e-6)))
        return values if self.better == "higher" else -values


_COPIES = (
    "Full-reference: only the target's own pixels count as right. It favours what copies or averages; of several "
    "plausible fills, all but one are punished."
)
_KEPT = (
    "Before paste-back, against what was shown: how well the model repeats what it should not touch. A pure copy wins."
)

SCORES: dict[str, Score] = {
    "hole_psnr": Score("PSNR in the hole", "dB", "higher", _COPIES),
    "hole_ssim": Score("SSIM in the hole", "", "higher", f"Structure rather than level. {_COPIES}"),
    "hole_ciede2000": Score("CIEDE2000 in the hole", "ΔE", "lower", f"Colour as the eye sees it. {_COPIES}"),
    "hole_flip": Score(
        "FLIP in the hole", "", "lower", f"What an eye notices when the two pictures alternate. {_COPIES}"
    ),
    "hole_perceptual": Score(
        "ST-LPIPS in the hole",
        "",
        "lower",
        "A learned distance (shift-tolerant LPIPS, AlexNet): forgives pixels that moved a little, sees texture. "
        "Still against the target.",
    ),
    "keep_psnr": Score("PSNR outside", "dB", "higher", _KEPT),
    "keep_ssim": Score("SSIM outside", "", "higher", _KEPT),
    "keep_ciede2000": Score("CIEDE2000 outside", "ΔE", "lower", _KEPT),
    "seam_error": Score(
        "Seam error",
        "",
        "lower",
        "After paste-back: the jump of brightness across the hole's edge, against the target's own. Catches a visible "
        "edge that a mean over the hole hides; blind to what lies within.",
    ),
    "color_shift": Score(
        "Colour shift",
        "",
        "lower",
        "Distance of the mean colours in the hole. Catches a cast; blind to any detail.",
    ),
    "detail": Score(
        "Detail",
        "x",
        "one",
        "Strength of fine structure in the hole, fill / target. No-reference in spirit: 1 is as sharp, less is blur, "
        "more is noise. It does not ask whether the detail is right; blur wins in PSNR and loses here.",
    ),
    "unpainted": Score(
        "Left unpainted",
        "",
        "lower",
        "Share of the hole that is still the grey which the model was shown. Catches a copy of the masked input, which "
        "scores over the whole picture let pass.",
    ),
    "reinpaint_psnr": Score(
        "Re-inpainting",
        "dB",
        "higher",
        "Self-consistency: the fill is taken as given, its surroundings are masked and filled again, and compared with "
        "the picture there. Needs no target in the hole; a smooth fill is easily continued, so it favours blur.",
    ),
    "loss": Score(
        "Loss",
        "",
        "lower",
        "Mean of the training loss on fixed noise at five noise levels. The steadiest of all, and about the whole "
        "picture; nothing is sampled, so it shows no seam and no cast.",
    ),
    **{
        f"loss_sigma_{middle}": Score(
            f"Loss at sigma {middle}", "", "lower", "Low sigma: fine detail; high sigma: what is where."
        )
        for middle in SIGMA_BINS
    },
}


def measure(fill: Tensor, target: Tensor, image: Tensor, mask: Tensor) -> dict[str, float]:
    """Scores of a fill before paste-back. image: what the model was shown around the hole.

    Those outside are left out where all is hole.
    """
    pasted = paste_back(fill, image, mask)
    scores = {
        "hole_psnr": hole_psnr(fill, target, mask),
        "hole_ssim": ssim(fill, target, mask),
        "hole_ciede2000": ciede2000(fill, target, mask),
        "seam_error": seam_error(pasted, target, mask),
        "color_shift": color_shift(pasted, target, mask),
        "detail": detail(fill, target, mask),
        "unpainted": unpainted(fill, target, mask),
    }
    if (learned := perceptual(fill, target, mask)) is not None:
        scores["hole_perceptual"] = learned
    if (distance := flip(pasted, paste_back(target, image, mask), mask)) is not None:
        scores["hole_flip"] = distance
    if not mask.all():
        scores |= {
            "keep_psnr": keep_psnr(fill, image, mask),
            "keep_ssim": ssim(fill, image, ~mask),
            "keep_ciede2000": ciede2000(fill, image, ~mask),
        }
    return scores


def ssim(picture: Tensor, target: Tensor, region: Tensor) -> float:
    """Structural similarity, mean over a region; 1 = equal."""
    settings: dict[str, Any] = {"channel_axis": 2, "data_range": 1.0, "win_size": _SSIM_WINDOW, "full": True}
    _, similarity = structural_similarity(_array(picture), _array(target), **settings)
    return float(similarity[region.numpy()].mean())


def ciede2000(picture: Tensor, target: Tensor, region: Tensor) -> float:
    """Colour difference CIEDE2000, mean over a region; about 1 can just be seen, side by side."""
    colours = [rgb2lab(_array(each)[region.numpy()]) for each in (picture, target)]
    return float(deltaE_ciede2000(*colours).mean())


def detail(picture: Tensor, target: Tensor, region: Tensor) -> float:
    """Strength of fine structure, picture / target: the mean absolute Laplacian of brightness in a region."""
    strengths = [_laplacian(each.mean(dim=0))[region].abs().mean().item() for each in (picture, target)]
    return (strengths[0] + 1e-4) / (strengths[1] + 1e-4)  # of a plain wall, both are about 0


def _laplacian(brightness: Tensor) -> Tensor:
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    padded = torch.nn.functional.pad(brightness[None, None], (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.conv2d(padded, kernel)[0, 0]


def unpainted(picture: Tensor, target: Tensor, mask: Tensor) -> float:
    """Share of the hole's pixels that are the grey which the model was shown; those that are so in the target too do
    not count."""
    grey = [((each[:, mask] - _GREY).abs() <= _GREY_LEVELS).all(dim=0) for each in (picture, target)]
    return float((grey[0] & ~grey[1]).float().mean())


def flip(picture: Tensor, target: Tensor, region: Tensor) -> float | None:
    """FLIP, mean over a region, 0 = the same; at 67 pixels a degree, the package's own default. None: its package is
    not installed."""
    try:
        import flip_evaluator
    except ImportError:
        return None
    arrays = [np.ascontiguousarray(_array(each), dtype=np.float32) for each in (target, picture)]
    errors, *_ = flip_evaluator.evaluate(*arrays, "LDR", applyMagma=False, computeMeanError=False)
    return float(np.asarray(errors).reshape(region.shape)[region.numpy()].mean())


def ring_of(mask: Tensor, width: int) -> Tensor:
    """The surroundings of a hole, `width` pixels of them: the hole of the second fill."""
    padded = mask.float()[None, None]
    grown = torch.nn.functional.max_pool2d(padded, 2 * width + 1, stride=1, padding=width)[0, 0] > 0
    return grown & ~mask


def reinpaint_psnr(second: Tensor, image: Tensor, ring: Tensor) -> float:
    """Of the second fill, where the picture is known."""
    return psnr(second, image, ring)


def _array(picture: Tensor) -> np.ndarray:
    """[H, W, 3], float64."""
    return picture.permute(1, 2, 0).double().numpy()
