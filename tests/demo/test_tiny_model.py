import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxFillPipeline, FluxPipeline, FluxTransformer2DModel
from PIL import Image

from configs.errors import InputError
from demo.photographs import make_triples
from demo.tiny_model import VAE_FOLDER, build_tiny_model
from demo.train_vae import demo_pictures, measure_round_trip


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Iterator[FluxFillPipeline]:
    pipeline = FluxFillPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        yield pipeline


@pytest.fixture(scope="module")
def vae(tiny_model: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_model, subfolder="vae")


def test_the_committed_vae_is_small() -> None:
    assert sum(path.stat().st_size for path in VAE_FOLDER.iterdir()) <= 4_000_000


def test_the_vae_brings_the_demo_crops_back_at_24_db(vae: AutoencoderKL) -> None:
    assert measure_round_trip(vae)["whole"] >= 24.0


def test_latents_have_zero_mean_and_unit_variance(vae: AutoencoderKL) -> None:
    with torch.no_grad():
        latents = torch.cat([vae.encode(picture).latent_dist.mode().flatten(2) for picture, _ in demo_pictures()], 2)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert latents.mean().item() == pytest.approx(0, abs=0.01)
    assert latents.std().item() == pytest.approx(1, abs=0.01)
    assert latents.std(dim=2).min() > 0.5, "no channel is dead"


def test_a_sample_of_the_posterior_is_nearly_its_mean(vae: AutoencoderKL) -> None:
    picture, _ = demo_pictures()[0]
    with torch.no_grad():
        posterior = vae.encode(picture).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert (sample - posterior.mode()).abs().max() * vae.config.scaling_factor < 0.02


def test_the_folder_is_a_whole_flux_fill(tiny_model: Path, pipeline: FluxFillPipeline) -> None:
    parts = {path.name for path in tiny_model.iterdir() if path.is_dir()}
    assert parts == {
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"
    }  # fmt: skip
    assert json.loads((tiny_model / "model_index.json").read_text())["_class_name"] == "FluxFillPipeline"
    assert (pipeline.transformer.config.in_channels, pipeline.transformer.config.out_channels) == (384, 64)
    assert 5.2e6 < pipeline.transformer.num_parameters() < 5.4e6
    assert pipeline.vae_scale_factor == 8
    assert (pipeline.tokenizer.model_max_length, pipeline.tokenizer_2.model_max_length) == (77, 512)
    assert pipeline.text_encoder_2.config.pad_token_id == pipeline.tokenizer_2.pad_token_id == 0


def test_the_fill_pipeline_samples_a_picture_that_is_not_square(pipeline: FluxFillPipeline) -> None:
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[16:48, 24:72] = 255
    picture = pipeline(
        prompt="a close-up of a tabby cat",
        image=Image.new("RGB", (96, 64), (90, 120, 200)),
        mask_image=Image.fromarray(mask),
        height=64,
        width=96,
        num_inference_steps=2,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert picture.size == (96, 64)


# The keys of the published files, FLUX.1-dev's revision 3de623f; those that say where a file came from left out.
PUBLISHED_KEYS = {
    "model_index.json": "scheduler text_encoder text_encoder_2 tokenizer tokenizer_2 transformer vae",
    "scheduler/scheduler_config.json": "base_image_seq_len base_shift max_image_seq_len max_shift num_train_timesteps "
    "shift use_dynamic_shifting",
    "text_encoder/config.json": "architectures attention_dropout bos_token_id dropout eos_token_id hidden_act "
    "hidden_size initializer_factor initializer_range intermediate_size layer_norm_eps max_position_embeddings "
    "model_type num_attention_heads num_hidden_layers pad_token_id projection_dim torch_dtype vocab_size",
    "text_encoder_2/config.json": "architectures classifier_dropout d_ff d_kv d_model decoder_start_token_id "
    "dense_act_fn dropout_rate eos_token_id feed_forward_proj initializer_factor is_encoder_decoder is_gated_act "
    "layer_norm_epsilon model_type num_decoder_layers num_heads num_layers output_past pad_token_id "
    "relative_attention_max_distance relative_attention_num_buckets tie_word_embeddings torch_dtype use_cache "
    "vocab_size",
    "transformer/config.json": "attention_head_dim axes_dims_rope guidance_embeds in_channels joint_attention_dim "
    "num_attention_heads num_layers num_single_layers patch_size pooled_projection_dim",
    "vae/config.json": "act_fn block_out_channels down_block_types force_upcast in_channels latent_channels "
    "latents_mean latents_std layers_per_block mid_block_add_attention norm_num_groups out_channels sample_size "
    "scaling_factor shift_factor up_block_types use_post_quant_conv use_quant_conv",
}


@pytest.mark.parametrize("model", ["tiny_model", "tiny_dev_model"])
@pytest.mark.parametrize("file", PUBLISHED_KEYS)
def test_the_settings_have_the_keys_of_the_published_files(model: str, file: str, request) -> None:
    keys = set(PUBLISHED_KEYS[file].split())
    if (model, file) == ("tiny_model", "transformer/config.json"):
        keys.add("out_channels")  # of FLUX.1-Fill alone, for dev's predicts as many channels as it takes
    settings = json.loads((request.getfixturevalue(model) / file).read_text())
    assert {key for key in settings if not key.startswith("_") and key != "transformers_version"} == keys


def test_the_pooled_text_is_that_of_the_first_end_mark(pipeline: FluxFillPipeline) -> None:
    """The published eos_token_id is not the tokenizer's: transformers then takes the largest id for the end."""
    assert pipeline.text_encoder.config.eos_token_id == 2
    ids = pipeline.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    output = pipeline.text_encoder(ids)
    end = ids[0].tolist().index(pipeline.tokenizer.eos_token_id)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])


@pytest.mark.parametrize("length", [64, 512])
def test_captions_are_padded_to_the_length_asked_for_and_stay_apart(pipeline: FluxFillPipeline, length: int) -> None:
    captions = sorted({triple.caption for triple in make_triples()})
    t5, pooled, _ = pipeline.encode_prompt([*captions, ""], None, max_sequence_length=length)
    assert t5.shape == (len(captions) + 1, length, 64)
    assert pooled.shape == (len(captions) + 1, 32)
    for embeddings in (t5.flatten(1), pooled):
        distances = torch.cdist(embeddings, embeddings)
        assert distances[~torch.eye(len(distances), dtype=torch.bool)].min() > 0.1


def test_the_tokenizers_know_words_of_no_caption(pipeline: FluxFillPipeline) -> None:
    text = "zebra, 42 quails"
    clip, t5 = pipeline.tokenizer, pipeline.tokenizer_2
    assert clip.decode(clip(text).input_ids, skip_special_tokens=True) == "zebra , 4 2 quails"
    assert t5.decode(t5(text).input_ids, skip_special_tokens=True) == text


def test_a_long_caption_is_cut_with_its_end_token_kept(pipeline: FluxFillPipeline) -> None:
    tokenizer = pipeline.tokenizer_2
    ids = tokenizer("a cat " * 100, padding="max_length", max_length=64, truncation=True).input_ids
    assert len(ids) == 64
    assert ids[-1] == tokenizer.eos_token_id


def test_building_again_leaves_the_folder_as_it_is(tiny_model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_model.rglob("*")}
    build_tiny_model(tiny_model)
    assert {path: path.stat().st_mtime_ns for path in tiny_model.rglob("*")} == before


def test_the_same_bytes_every_time(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()
    build_tiny_model(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"
    for path in tiny_model.rglob("*"):
        if path.is_file():
            assert (tmp_path / "model" / path.relative_to(tiny_model)).read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left beside the folder"


def test_a_folder_that_holds_another_model_is_refused(tiny_dev_model: Path) -> None:
    with pytest.raises(InputError, match="does not hold this tiny model"):
        build_tiny_model(tiny_dev_model)


def test_the_dev_model_has_64_inputs_and_samples(tiny_dev_model: Path) -> None:
    assert FluxTransformer2DModel.load_config(tiny_dev_model, subfolder="transformer")["in_channels"] == 64
    pipeline = FluxPipeline.from_pretrained(tiny_dev_model)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a dahlia", height=48, width=64, num_inference_steps=1, max_sequence_length=64).images[0]
    assert picture.size == (64, 48)
