"""Validation's VAE computes in its own dtype, and each rank its own share of what it can do at best."""

import pytest
import torch

from data.encoders.encode import decode_latents, encode_images
from trainer.validation.sampling_vae import load_sampling_vae
from trainer.validation.validator import Validator

CPU = torch.device("cpu")


def test_pictures_go_through_the_vae_one_by_one(tiny_model):
    vae = load_sampling_vae(tiny_model, device=CPU, dtype=torch.bfloat16)
    seen = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda _, inputs, out: seen.append((len(inputs[0]), out.dtype)))
    decode_latents(vae, encode_images(vae, torch.rand(2, 3, 64, 64)))
    assert seen == [(1, torch.bfloat16)] * 4


class _Rank:
    """The engine of a rank among several, alone.  gathered: what it sent to all."""

    def __init__(self, engine, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.is_main = rank, world_size, False
        self.device, self.compute_dtype = engine.device, engine.compute_dtype
        self.name, self.gpus = engine.name, engine.gpus
        self.ranks, self.gathered = self, []
        self.broadcast_object, self.all_reduce_sum = lambda item: item, float

    def all_gather(self, item):
        self.gathered.append(item)
        return [item]


@pytest.mark.parametrize("world_size", [2, 20])
def test_each_rank_decodes_a_share_of_the_round_trips(config, engine, tiny_model, samples, tmp_path, world_size):
    run = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})})
    alone = _Rank(engine, 0, 1)
    Validator(run, alone, tiny_model, samples)
    found: dict = {}
    shares = []
    for rank in range(world_size):
        of_rank = _Rank(engine, rank, world_size)
        Validator(run, of_rank, tiny_model, samples)
        shares.append(of_rank.gathered[-1])
        found |= shares[-1]
    assert sum(map(len, shares)) == len(found)  # none of them twice
    assert max(map(len, shares)) < len(found)
    assert found.keys() == alone.gathered[-1].keys()
    for number, figures in alone.gathered[-1].items():
        assert found[number] == pytest.approx(figures, abs=1e-3)
