import numpy as np
import pytest
import torch

from configs.errors import InputError
from tests.trainer.evaluation.photographs import PLACES, blurred, hole, in_hole, photograph, shifted
from trainer.evaluation import perceptual as module
from trainer.evaluation.perceptual import load_perceptual, perceptual, weights_file

installed = pytest.mark.skipif(weights_file() is None, reason="stlpips-pytorch is not installed")


@installed
def test_every_tensor_of_the_file_is_in_its_place():
    """Not as many as there are names, but numbers of a trained network: blur kernels that sum to 1, heads that only add
    to a distance."""
    tensors = load_perceptual().state_dict()
    assert tensors.keys() == module._OFFSETS.keys()
    for name, tensor in tensors.items():
        assert tensor.isfinite().all() and tensor.abs().max() < 10 and tensor.count_nonzero() > 0
        if name.endswith(".filt"):
            assert torch.allclose(tensor.sum(dim=(1, 2, 3)), torch.ones(len(tensor)))
        if name.startswith("lin"):
            assert (tensor >= 0).all()


@installed
@pytest.mark.parametrize("name", PLACES)
def test_it_ranks_known_faults_by_their_size(name):
    target, random = photograph(name), np.random.default_rng(0)
    noise = torch.from_numpy(random.normal(0, 1, (3, 128, 128))).float()
    blurs = [perceptual(blurred(target, sigma), target, hole()) for sigma in (0.3, 1, 2, 4)]
    noises = [perceptual((target + size * noise).clamp(0, 1), target, hole()) for size in (0.01, 0.05, 0.2)]
    assert perceptual(target, target, hole()) == 0
    assert blurs == sorted(blurs) and noises == sorted(noises)


@installed
@pytest.mark.parametrize("name", PLACES)
def test_it_forgives_a_shift_that_psnr_punishes_like_a_blur(name):
    target = photograph(name)
    moved, blur = shifted(target, 1), blurred(target, 1.0)
    assert perceptual(moved, target, hole()) < 0.3 * perceptual(blur, target, hole())


@installed
def test_it_looks_at_the_region_alone():
    target = photograph("coffee")
    found = perceptual(in_hole(1 - target, target), target, hole())
    assert found > 5 * perceptual(
        in_hole(1 - target, target), target, torch.arange(128)[:, None].expand(128, 128) > 116
    )


def test_another_file_is_refused_and_a_missing_one_left_out(tmp_path, monkeypatch):
    other = tmp_path / "alex.pth"
    other.write_bytes(b"something else")
    monkeypatch.setattr(module, "weights_file", lambda: other)
    with pytest.raises(InputError, match=r"not that of stlpips-pytorch 0\.0\.2"):
        load_perceptual.__wrapped__()
    monkeypatch.setattr(module, "weights_file", lambda: None)
    monkeypatch.setattr(module, "load_perceptual", load_perceptual.__wrapped__)
    assert perceptual(photograph("coffee"), photograph("coffee"), hole()) is None
