from pathlib import Path

import torch

from benchmarks.gpu_case import RECIPE, prepare
from benchmarks.gpu_inputs import FLUX, TINY, random_weights, write_model
from configs.loading import load_config
from data.cache.open_cache import open_cache
from data.encoders.model_folder import find_model
from trainer.model.flux import empty_transformer


def test_the_folder_is_that_of_a_whole_flux_fill(tmp_path):
    write_model(tmp_path / "flux", FLUX.shape)
    transformer = empty_transformer(find_model(str(tmp_path / "flux")), dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in transformer.parameters()) == FLUX.shape.parameters == 11_902_391_360


def test_the_weights_are_the_same_every_time_and_in_the_numbers_of_bf16(tmp_path):
    write_model(tmp_path / "tiny", TINY.shape)
    load = random_weights(torch.device("cpu"))
    wide, narrow = (load(tmp_path / "tiny", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for (name, weight), other in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert torch.equal(weight, other.float()), name
        assert weight.any() or name.endswith("bias")


def test_the_cache_is_one_that_a_run_opens(tmp_path):
    config = load_config(RECIPE, prepare(TINY, ["run.name=x"], tmp_path, side=512, samples=2))
    cache = open_cache(config, Path(config.model.base))
    assert cache.table.bucket.tolist() == ["32x32"] and cache.manifest.text_length == TINY.text
