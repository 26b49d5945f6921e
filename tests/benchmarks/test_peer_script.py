"""The peer is a correct one: what it feeds the model, and its loss, are ours."""

import torch

from benchmarks import peer_script
from configs.schema import FlowConfig
from data.batches.micro_batch import unpack_mask
from tests.trainer.conftest import load_triple, pipeline  # noqa: F401
from trainer.model.flow import flow_loss, mix_noise, region_weight
from trainer.model.flux import pack_fill_condition, pack_latents, predict_velocity


def test_the_peers_loss_is_ours(pipeline, load_triple):  # noqa: F811
    rows, flow, sigma = load_triple(64, 64, of=(64, 64)).rows, FlowConfig(), torch.tensor([0.3])
    latents, masked, mask = rows.latents.float(), rows.masked_latents.float(), unpack_mask(rows.mask)
    noisy = mix_noise(latents, rows.noise, sigma)
    assert torch.equal(peer_script.pack_condition(masked, mask), pack_fill_condition(masked, mask))
    with torch.no_grad():
        ours = predict_velocity(pipeline.transformer, noisy, rows, sigma, flow)
        condition = peer_script.pack_condition(masked, mask)
        theirs = peer_script.predict(
            pipeline.transformer, noisy, condition, sigma, rows.t5.float(), rows.pooled.float()
        )
    torch.testing.assert_close(theirs, ours)
    loss = torch.nn.functional.mse_loss(theirs, peer_script.pack(rows.noise - latents))
    torch.testing.assert_close(
        loss, flow_loss(ours, pack_latents(rows.noise - latents), region_weight(mask, flow)).mean()
    )


def test_the_peer_reads_the_picture_with_its_hole_in_grey(pipeline, triples):  # noqa: F811
    data = peer_script.Triples(triples, pipeline)
    sample = data[0]
    hole = sample["mask"][0] == 1
    assert 0.1 < hole.float().mean() < 0.6
    assert (sample["masked"][:, hole] == 0).all() and (sample["masked"][:, ~hole] != 0).any()
    assert sample["caption"]
