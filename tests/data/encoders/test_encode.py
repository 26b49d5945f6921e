from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.data_schema import EncodersConfig
from data.encoders.encode import (
    blank_hole,
    collate_pixels,
    decode_latents,
    encode_captions,
    encode_images,
    encode_pixels,
    to_signed,
)
from data.encoders.load import load_encoders
from data.samples.geometry import Bucket, Pixels, fit
from data.sources.pictures import load_mask, load_picture

CPU = torch.device("cpu")
CAPTIONS = [
    "",
    "a cup of coffee on a table, upper left part",
    "a quick brown fox jumps over the lazy dog",
    "Remove the person; keep the sky!",
    " ".join(["a very long caption that no encoder takes whole"] * 40),
    "猫",
    "a",
    "a red motorcycle in a garage",
]


@pytest.fixture(scope="module")
def encoders(tiny_model):
    """The tiny model's VAE and text encoders, in fp32."""
    return load_encoders(tiny_model, EncodersConfig(vae="cpu", clip="cpu", t5="cpu"), device_index=0)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    """diffusers' own pipeline, its VAE giving the posterior's mean where the pipeline samples."""
    from diffusers import FluxFillPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    pipe = FluxFillPipeline.from_pretrained(tiny_model)
    encode = pipe.vae.encode

    def encode_to_mean(images):
        moments = encode(images).latent_dist.parameters
        return AutoencoderKLOutput(DiagonalGaussianDistribution(moments, deterministic=True))

    pipe.vae.encode = encode_to_mean
    return pipe


@pytest.fixture(scope="module")
def batch(triples):
    """Eight of the demo's square triples, as pixels."""
    found = []
    for target in sorted((triples / "target").glob("*.png")):
        picture = load_picture(target, max_megapixels=1)
        if picture.size == (64, 64) and len(found) < 8:
            mask = load_mask(triples / "mask" / target.name, max_megapixels=1)
            source = load_picture(triples / "source" / target.name, max_megapixels=1)
            found.append(fit(picture, mask, source, Bucket(64, 64)))
    assert len(found) == 8
    return found


def encode(vae, batch):
    """(latents, masked_latents) of pictures with one mask each, [B, 16, h, w]."""
    encoded = encode_pixels(vae, collate_pixels([[pixels] for pixels in batch]))
    return encoded.latents, encoded.masked_latents[0]


@torch.no_grad()
def test_latents_are_the_pipelines(encoders, pipeline, batch):
    for pixels in batch:
        latents, masked_latents = encode(encoders.vae, [pixels])
        assert latents.shape == masked_latents.shape == (1, 16, 8, 8)
        assert latents.dtype == masked_latents.dtype == torch.float32
        image = pipeline.image_processor.preprocess(Image.fromarray(pixels.target), height=64, width=64)
        expected = pipeline._encode_vae_image(image, generator=None)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)

        image = pipeline.image_processor.preprocess(Image.fromarray(pixels.image), height=64, width=64)
        mask = pipeline.mask_processor.preprocess(Image.fromarray(pixels.mask), height=64, width=64)
        packed_mask, packed = pipeline.prepare_mask_latents(
            mask, image * (1 - mask), 1, 16, 1, 64, 64, torch.float32, CPU, None
        )
        ours = pipeline._pack_latents(masked_latents, 1, 16, 8, 8)
        torch.testing.assert_close(ours, packed, rtol=0, atol=1e-6)
        assert packed_mask.sum() == pixels.mask.sum()


def test_the_hole_is_grey_whatever_stood_in_it(encoders, batch):
    pixels = batch[0]
    repainted = pixels.image.copy()
    repainted[pixels.mask] = 255 - repainted[pixels.mask]
    other = Pixels(pixels.target, repainted, pixels.mask)
    _, first = encode(encoders.vae, [pixels])
    _, second = encode(encoders.vae, [other])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    mask = torch.from_numpy(pixels.mask)[None, None].float()
    blanked = blank_hole(to_signed(torch.from_numpy(np.stack([pixels.image]))), mask)
    assert (blanked.masked_select(mask.bool()) == 0).all()


def test_pixels_are_scaled_to_plus_and_minus_one():
    signed = to_signed(torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8))
    assert signed.shape == (1, 3, 1, 1)
    assert signed.flatten().tolist() == pytest.approx([-1, 127 / 127.5 - 1, 1], abs=1e-6)


def test_a_batch_of_pictures_is_each_of_them_alone(encoders, batch):
    together = encode(encoders.vae, batch)
    for row, pixels in enumerate(batch):
        for many, one in zip(together, encode(encoders.vae, [pixels]), strict=True):
            torch.testing.assert_close(many[row : row + 1], one, rtol=0, atol=1e-5)


def test_a_variants_latents_do_not_hang_on_the_other_variants(encoders, batch):
    inverted = [[pixels, replace(pixels, mask=~pixels.mask)] for pixels in batch]
    both = encode_pixels(encoders.vae, collate_pixels(inverted))
    assert both.masked_latents.shape == (2, 8, 16, 8, 8)
    for variant in range(2):
        alone = encode_pixels(encoders.vae, collate_pixels([[masks[variant]] for masks in inverted]))
        assert torch.equal(both.latents, alone.latents)
        assert torch.equal(both.masked_latents[variant], alone.masked_latents[0])


def test_latents_are_decoded_as_the_pipeline_does(encoders, pipeline, batch):
    latents, _ = encode(encoders.vae, batch[:2])
    decoded = decode_latents(encoders.vae, latents)
    assert (decoded.shape, decoded.dtype) == ((2, 3, 64, 64), torch.float32)
    with torch.no_grad():
        raw = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        expected = pipeline.image_processor.postprocess(pipeline.vae.decode(raw).sample, output_type="pt")
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-6)
    target = to_signed(torch.from_numpy(np.stack([pixels.target for pixels in batch[:2]]))) / 2 + 0.5
    assert (decoded - target).square().mean() < 0.01, "20 dB: it is not the picture that was encoded"


@pytest.mark.parametrize("text_length", [16, 64, 512])
@torch.no_grad()
def test_captions_are_the_pipelines(encoders, pipeline, text_length):
    encoded = encode_captions(encoders.text, CAPTIONS, text_length=text_length)
    t5, pooled, _ = pipeline.encode_prompt(CAPTIONS, prompt_2=None, max_sequence_length=text_length)
    assert t5.shape == encoded.t5.shape == (8, text_length, 64)
    torch.testing.assert_close(encoded.t5, t5, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoded.pooled, pooled, rtol=0, atol=1e-6)


def test_a_batch_of_captions_is_each_of_them_alone(encoders):
    together = encode_captions(encoders.text, CAPTIONS, text_length=64)
    for row, caption in enumerate(CAPTIONS):
        one = encode_captions(encoders.text, [caption], text_length=64)
        torch.testing.assert_close(together.t5[row : row + 1], one.t5, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.pooled[row : row + 1], one.pooled, rtol=0, atol=1e-5)
        assert together.tokens[row] == one.tokens[0]


def test_real_tokens_are_counted_with_their_end_mark(encoders):
    tokens = encode_captions(encoders.text, CAPTIONS, text_length=32).tokens
    assert tokens[CAPTIONS.index("")] == 1
    assert tokens[4] == 32, "a caption that is cut fills the whole length"
    assert all(1 < count < 32 for count in (tokens[1], tokens[2]))


def test_encoders_are_frozen(encoders):
    for part in (encoders.vae, encoders.text.clip, encoders.text.t5):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    images = torch.zeros(1, 3, 16, 16, requires_grad=True)
    assert not encode_images(encoders.vae, images).requires_grad
