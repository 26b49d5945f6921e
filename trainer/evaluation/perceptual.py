"""ST-LPIPS: a learned distance between pictures that forgives a shift of a few pixels (Ghildyal and Liu, 2022).

Its weights, trunk and heads, lie in the wheel `stlpips-pytorch` (BSD-2), so nothing is downloaded. The wheel's code is
not imported: it needs torchvision, IPython and torchsummary, which it does not say. Nor is its file unpickled: it is
known by its hash, and the numbers are read from where they lie in it.
"""

from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from configs.errors import InputError

_WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"
_SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
_OFFSETS = {  # of each tensor's numbers in the file, fp32
    "scaling_layer.shift": 9801436,
    "scaling_layer.scale": 9794496,
    "net.slice1.0.weight": 9801456,
    "net.slice1.0.bias": 9894392,
    "net.slice1.1.filt": 2659968,
    "net.slice2.4.filt": 2659968,
    "net.slice2.5.weight": 2666400,
    "net.slice2.5.bias": 2665624,
    "net.slice3.8.filt": 9794516,
    "net.slice3.9.weight": 5752,
    "net.slice3.9.bias": 4208,
    "net.slice4.11.weight": 6255544,
    "net.slice4.11.bias": 3895208,
    "net.slice5.13.weight": 3896240,
    "net.slice5.13.bias": 2662280,
    "lin0.model.1.weight": 9898008,
    "lin1.model.1.weight": 9896200,
    "lin2.model.1.weight": 9894656,
    "lin3.model.1.weight": 9896976,
    "lin4.model.1.weight": 9898272,
}
_WIDTHS = (64, 192, 384, 256, 256)
_LEAST_SIDE = 32  # of a picture: below it the last layers have nothing to see


class _BlurPool(nn.Module):
    """Every second pixel of a blurred map: a shift by one pixel changes little."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
        return nn.functional.conv2d(padded, self.filt, stride=2, groups=len(self.filt))


class _Trunk(nn.Module):
    """AlexNet, its strides in blurred pools; layers numbered as in the file."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third, fourth, fifth = _WIDTHS
        layers: list[list[tuple[int, nn.Module]]] = [
            [(0, nn.Conv2d(3, first, 11, padding=2)), (1, _BlurPool(first)), (2, nn.ReLU())],
            [
                (3, nn.MaxPool2d(3, 1)),
                (4, _BlurPool(first)),
                (5, nn.Conv2d(first, second, 5, padding=2)),
                (6, nn.ReLU()),
            ],
            [
                (7, nn.MaxPool2d(3, 1)),
                (8, _BlurPool(second)),
                (9, nn.Conv2d(second, third, 3, padding=1)),
                (10, nn.ReLU()),
            ],
            [(11, nn.Conv2d(third, fourth, 3, padding=1)), (12, nn.ReLU())],
            [(13, nn.Conv2d(fourth, fifth, 3, padding=1)), (14, nn.ReLU())],
        ]
        for number, part in enumerate(layers, start=1):
            slice_ = nn.Sequential()
            for place, layer in part:
                slice_.add_module(str(place), layer)
            self.add_module(f"slice{number}", slice_)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for part in self.children():
            x = part(x)
            found.append(x)
        return found


class PerceptualDistance(nn.Module):
    """The distance at every pixel, from the differences of the trunk's maps, weighted by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Trunk()
        for number, width in enumerate(_WIDTHS):
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{number}", head)
        self.scaling_layer = nn.Module()
        for name in ("shift", "scale"):
            self.scaling_layer.register_buffer(name, torch.zeros(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, picture: Tensor, target: Tensor) -> Tensor:
        """picture, target: fp32 [3, H, W] in [0, 1].  Returns fp32 [H, W]."""
        shift, scale = (self.scaling_layer.get_buffer(name) for name in ("shift", "scale"))
        scaled = (torch.stack([picture, target]) * 2 - 1 - shift) / scale
        total = torch.zeros(1, 1, *picture.shape[-2:])
        for number, maps in enumerate(self.net(scaled)):
            unit = maps / (maps.norm(dim=1, keepdim=True) + 1e-10)
            distance = self.get_submodule(f"lin{number}.model")((unit[:1] - unit[1:]).square())
            total += nn.functional.interpolate(distance, size=picture.shape[-2:], mode="bilinear", align_corners=False)
        return total[0, 0]


def weights_file() -> Path | None:
    """The weights in the installed wheel; None: it is not installed."""
    found = find_spec("stlpips_pytorch")
    places = found.submodule_search_locations if found is not None else None
    return next((path for place in places or [] if (path := Path(place) / _WEIGHTS).is_file()), None)


@cache
def load_perceptual() -> PerceptualDistance | None:
    """The distance, every one of its tensors from the file; None: the wheel is not installed.

    Raises InputError if the file is another one.
    """
    if (file := weights_file()) is None:
        return None
    data = file.read_bytes()
    if sha256(data).hexdigest() != _SHA256:
        raise InputError(f"{file}: is not that of stlpips-pytorch 0.0.2, whose layout is known here. Install that.")
    model = PerceptualDistance()
    tensors = {
        name: torch.from_numpy(np.frombuffer(data, "<f4", own.numel(), _OFFSETS[name]).copy()).view(own.shape)
        for name, own in model.state_dict().items()
    }
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def perceptual(picture: Tensor, target: Tensor, region: Tensor) -> float | None:
    """ST-LPIPS, mean over a region, 0 = the same. None: its wheel is not installed, or the pictures are too small."""
    model = load_perceptual()
    if model is None or min(region.shape) < _LEAST_SIDE:
        return None
    return float(model(picture, target)[region].mean())
