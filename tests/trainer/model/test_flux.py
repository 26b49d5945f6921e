"""FluxFillPipeline is the judge: every number that the transformer is given must be the one the pipeline gives it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from configs.schema import FlowConfig
from data.batches.micro_batch import unpack_mask
from data.encoders.encode import decode_latents
from tests.payloads import canary_object
from trainer.model.flux import (
    empty_transformer,
    expand_to_fill,
    image_ids,
    load_transformer,
    pack_fill_condition,
    pack_latents,
    pack_mask,
    predict_velocity,
)

# bucket, and the size of the triple that is fitted to it: as it is, enlarged, and both odd shapes
BUCKETS = [((64, 64), (64, 64)), ((96, 96), (64, 64)), ((48, 80), (48, 80)), ((160, 96), (80, 48))]


class _Seen(Exception):
    """Carries the arguments of a transformer's call out of it."""


def arguments_of(transformer, call):
    """What `call` gives to the transformer, the first time."""

    def stop(module, args, kwargs):
        assert not args
        raise _Seen(kwargs)

    handle = transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        call()
    except _Seen as seen:
        return seen.args[0]
    finally:
        handle.remove()
    raise AssertionError("the transformer was not called")


def sample(pipeline: FluxFillPipeline, triple, **settings):
    """The pipeline's own call on a triple's files, with the triple's noise."""
    bucket = triple.rows.bucket
    return pipeline(
        prompt=triple.caption,
        image=triple.source,
        mask_image=triple.mask,
        height=bucket.height,
        width=bucket.width,
        guidance_scale=30.0,
        latents=pack_latents(triple.rows.noise),
        max_sequence_length=triple.rows.t5.shape[1],
        **settings,
    )


@pytest.fixture
def mean_of_posterior(monkeypatch):
    """The pipeline samples the VAE's posterior; the cache holds its mean."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.mark.parametrize("bucket, of", BUCKETS)
@pytest.mark.usefixtures("mean_of_posterior")
def test_every_input_of_a_real_triple_is_the_pipelines(pipeline, load_triple, bucket, of):
    triple = load_triple(*bucket, of=of)
    theirs = arguments_of(pipeline.transformer, lambda: sample(pipeline, triple, num_inference_steps=1))
    rows, sigma = triple.rows, torch.ones(1)  # at sigma 1 the noisy latents are the noise
    ours = arguments_of(
        pipeline.transformer, lambda: predict_velocity(pipeline.transformer, rows.noise, rows, sigma, FlowConfig())
    )

    assert theirs["hidden_states"].shape[-1] == 384
    assert theirs["hidden_states"][..., 128:].unique().tolist() == [
        0,
        1,
    ]  # the mask, with something to paint and to keep
    torch.testing.assert_close(ours["hidden_states"], theirs["hidden_states"], rtol=0, atol=1e-6)
    for name in ("timestep", "guidance", "img_ids", "txt_ids"):
        assert torch.equal(ours[name], theirs[name]), name
    for name in ("encoder_hidden_states", "pooled_projections"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert ours.keys() == theirs.keys() - {"joint_attention_kwargs"}


@pytest.mark.parametrize("bucket, of", BUCKETS[:3:2])
@pytest.mark.usefixtures("mean_of_posterior")
def test_our_velocity_through_the_pipelines_scheduler_gives_its_picture(pipeline, load_triple, bucket, of):
    triple = load_triple(*bucket, of=of)
    theirs = sample(pipeline, triple, num_inference_steps=6, output_type="pt").images

    rows, scheduler = triple.rows, pipeline.scheduler  # its timesteps are set by the call above
    h, w = rows.bucket.latent_size
    scheduler.set_begin_index(0)
    scheduler._step_index = None
    noisy = rows.noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            velocity = predict_velocity(pipeline.transformer, noisy, rows, timestep.view(1) / 1000, FlowConfig())
            packed = scheduler.step(velocity, timestep, pack_latents(noisy), return_dict=False)[0]
            noisy = pipeline._unpack_latents(packed, 8 * h, 8 * w, 8)
    torch.testing.assert_close(decode_latents(pipeline.vae, noisy), theirs, rtol=0, atol=1e-5)


def test_packing_is_the_pipelines_and_can_be_undone(pipeline):
    latents = torch.randn(2, 16, 6, 10)
    packed = pack_latents(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(pipeline._unpack_latents(packed, 48, 80, 8), latents)


def test_packed_mask_and_condition_are_the_pipelines(pipeline):
    mask = (torch.rand(2, 1, 48, 80) < 0.5).float()
    # Given 16 channels, it takes them for latents before shift and scale.
    raw = torch.randn(2, 16, 6, 10)
    their_mask, their_latents = pipeline.prepare_mask_latents(
        mask, raw, 2, 16, 1, 48, 80, torch.float32, torch.device("cpu"), None
    )
    latents = (raw - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert torch.equal(pack_mask(mask), their_mask)
    assert torch.equal(pack_fill_condition(latents, mask), torch.cat([their_latents, their_mask], dim=-1))


def test_a_mask_pixel_lands_in_its_own_feature():
    height, width, y, x = 32, 48, 21, 38
    mask = torch.zeros(1, 1, height, width)
    mask[0, 0, y, x] = 1
    token = (y // 16) * (width // 16) + x // 16
    feature = ((y % 8) * 8 + x % 8) * 4 + ((y % 16) // 8) * 2 + (x % 16) // 8
    assert pack_mask(mask).nonzero().tolist() == [[0, token, feature]]


def test_image_ids_are_the_pipelines(pipeline):
    cpu = torch.device("cpu")
    theirs = pipeline._prepare_latent_image_ids(1, 3, 5, cpu, torch.float32)  # it counts tokens, not latents
    assert torch.equal(image_ids(6, 10, cpu), theirs)


@pytest.mark.parametrize("size", [(5, 6), (6, 5)])
def test_odd_latents_are_refused(size):
    with pytest.raises(ValueError, match="multiples of 16"):
        pack_latents(torch.zeros(1, 16, *size))


def test_condition_keeps_the_dtype_of_the_latents():
    condition = pack_fill_condition(torch.zeros(1, 16, 2, 2, dtype=torch.bfloat16), torch.ones(1, 1, 16, 16))
    assert condition.dtype == torch.bfloat16


def test_samples_of_a_batch_do_not_see_each_other(pipeline, load_triple):
    first, second = (load_triple(64, 64, of=(64, 64)).rows for _ in range(2))
    second.noise.mul_(-1)
    both = type(first)(
        first.bucket,
        is_last=True,
        **{n: torch.cat([v, getattr(second, n)]) for n, v in vars(first).items() if isinstance(v, torch.Tensor)},
    )
    sigma = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        together = predict_velocity(pipeline.transformer, both.noise, both, sigma, FlowConfig())
        alone = [
            predict_velocity(pipeline.transformer, rows.noise, rows, sigma[i : i + 1], FlowConfig())
            for i, rows in enumerate((first, second))
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


# --- loading ----------------------------------------------------------------------------------------------------------


def velocity_of(transformer: FluxTransformer2DModel, rows) -> torch.Tensor:
    with torch.no_grad():
        return predict_velocity(transformer, rows.noise, rows, torch.tensor([0.7]), FlowConfig())


def dev_velocity_of(transformer: FluxTransformer2DModel, rows) -> torch.Tensor:
    """FLUX.1-dev's own output: it is told nothing of the hole."""
    h, w = rows.bucket.latent_size
    with torch.no_grad():
        return transformer(
            hidden_states=pack_latents(rows.noise),
            timestep=torch.tensor([0.7]),
            guidance=torch.tensor([30.0]),
            pooled_projections=rows.pooled,
            encoder_hidden_states=rows.t5,
            txt_ids=torch.zeros(rows.t5.shape[1], 3),
            img_ids=image_ids(h, w, torch.device("cpu")),
            return_dict=False,
        )[0]


def test_expanded_dev_gives_devs_output_whatever_the_condition(tiny_dev_model, load_triple):
    dev = FluxTransformer2DModel.from_pretrained(tiny_dev_model, subfolder="transformer")
    expanded = load_transformer(tiny_dev_model, dtype=torch.float32)
    rows = load_triple(64, 64, of=(64, 64)).rows
    outputs = []
    for condition in (rows.masked_latents.clone(), 100 * torch.randn_like(rows.masked_latents)):
        rows.masked_latents.copy_(condition)
        rows.mask.bitwise_not_()
        outputs.append(velocity_of(expanded, rows))
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], dev_velocity_of(dev, rows))
    weight = expanded.x_embedder.weight
    assert torch.equal(weight[:, :64], dev.x_embedder.weight)
    assert not weight[:, 64:].any()
    assert torch.equal(expanded.x_embedder.bias, dev.x_embedder.bias)


def test_expanded_dev_is_built_again_from_its_config_and_from_its_files(tiny_dev_model, tmp_path):
    expanded = load_transformer(tiny_dev_model, dtype=torch.float32)
    expanded.save_pretrained(tmp_path / "transformer")
    reloaded = FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    built = FluxTransformer2DModel.from_config(expanded.config)
    for again in (reloaded, built):
        assert (again.config.in_channels, again.config.out_channels) == (384, 64)
        assert (again.x_embedder.in_features, again.proj_out.out_features) == (384, 64)
    assert all(torch.equal(a, b) for a, b in zip(expanded.parameters(), reloaded.parameters(), strict=True))


def test_expansion_starts_with_gradients_for_the_new_inputs(tiny_dev_model, load_triple):
    """Zero weights learn, as long as what they multiply is not zero."""
    expanded = load_transformer(tiny_dev_model, dtype=torch.float32)
    rows = load_triple(64, 64, of=(64, 64)).rows
    predict_velocity(expanded, rows.noise, rows, torch.tensor([0.7]), FlowConfig()).square().mean().backward()
    assert expanded.x_embedder.weight.grad[:, 64:].abs().sum() > 0


@pytest.mark.parametrize("model", ["tiny_model", "tiny_dev_model"])
def test_empty_transformer_has_the_same_tensors_and_no_memory(model, request):
    folder = request.getfixturevalue(model)
    loaded = load_transformer(folder, dtype=torch.bfloat16)
    empty = empty_transformer(folder, dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in loaded.named_parameters()
    ]
    assert dict(empty.config)["out_channels"] == loaded.config.out_channels == 64


@pytest.fixture
def copied_model(tiny_model, tmp_path) -> Path:
    shutil.copytree(tiny_model / "transformer", tmp_path / "transformer")
    return tmp_path


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"in_channels": 128}, "128 input channels.*FLUX.1-Fill-dev"),  # Canny and Depth
        ({"in_channels": 64, "guidance_embeds": False}, "without guidance"),  # schnell
        ({"num_layers": 1}, "left over"),  # diffusers would drop a block
        ({"num_layers": 3}, "missing"),  # diffusers would leave a block without values
    ],
)
def test_another_model_is_refused(copied_model, changed, words):
    config = copied_model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(InputError, match=words) as refused:
        load_transformer(copied_model, dtype=torch.float32)
    assert str(copied_model) in str(refused.value)


def test_weights_cut_short_are_refused(copied_model):
    weights = copied_model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"cannot be loaded.*Fetch the model again"):
        load_transformer(copied_model, dtype=torch.float32)


@pytest.mark.fault(27, "a pickle in the place of the transformer's safetensors")
def test_pickled_weights_are_refused(copied_model, tmp_path):
    canary = tmp_path / "canary"
    weights = copied_model / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights) | {"extra": canary_object(canary)}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_transformer(copied_model, dtype=torch.float32)
    assert not canary.exists()


def test_a_transformer_without_its_last_layer_is_refused(copied_model):
    weights = copied_model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["proj_out.weight"]
    save_file(tensors, weights)
    with pytest.raises(InputError, match=r"proj_out\.weight"):
        load_transformer(copied_model, dtype=torch.float32)


def test_expansion_keeps_dtype_and_device():
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ).to(torch.bfloat16)  # fmt: skip
    expand_to_fill(transformer)
    assert transformer.x_embedder.weight.dtype == torch.bfloat16
    assert transformer.x_embedder.in_features == transformer.config.in_channels == 384


def test_mask_bits_are_in_numpys_order(load_triple):
    triple = load_triple(64, 64, of=(64, 64))
    pixels = unpack_mask(triple.rows.mask)[0, 0]
    assert pixels.dtype == torch.float32
    assert pixels.bool().tolist() == [[value >= 128 for value in row] for row in _rows_of(triple.mask)]


def _rows_of(picture) -> list[list[int]]:
    width, height = picture.size
    return [[picture.getpixel((x, y)) for x in range(width)] for y in range(height)]
