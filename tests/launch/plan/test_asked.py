"""Sizes of what is planned."""

import json

import pytest

from configs.errors import InputError
from configs.flux_shape import FluxShape
from configs.loading import load_config
from launch.command import REPO_ROOT
from launch.plan.asked import read_shape, sample_bytes, sample_tokens

LORA = REPO_ROOT / "configs" / "fill_lora.yaml"


def test_a_folder_says_its_sizes_and_a_known_hub_id_has_flux_1s(tmp_path):
    for part in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"):
        (tmp_path / part).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"num_layers": 8, "in_channels": 384}))
    assert read_shape(str(tmp_path)) == FluxShape(double_blocks=8)
    assert read_shape("black-forest-labs/FLUX.1-Fill-dev") == FluxShape()
    assert read_shape("black-forest-labs/FLUX.1-dev").in_channels == 64
    with pytest.raises(InputError, match="no such folder"):
        read_shape(str(tmp_path / "none"))


def test_a_cached_sample_is_as_large_as_its_tensors():
    config = load_config(LORA)
    sizes = [sample_bytes(config, FluxShape(), side) / 2**20 for side in (512, 1024)]
    assert sizes == pytest.approx([4.28, 5.13], abs=0.01)
    smaller = load_config(LORA, ["data.captions.text_dtype=int8"])
    assert sample_bytes(smaller, FluxShape(), 512) / 2**20 == pytest.approx(2.28, abs=0.01)


def test_a_sample_of_the_largest_bucket_is_counted():
    assert sample_tokens(load_config(LORA, ["data.resolution=[512, 768]"])) == 48**2 + 512
