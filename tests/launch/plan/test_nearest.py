"""The nearest plan that fits where one does not."""

import pytest

from configs.flux_shape import FluxShape
from configs.gpu_profiles import load_gpu_profile
from configs.loading import load_config
from configs.plan import Cluster
from launch.command import REPO_ROOT
from launch.plan.nearest import nearest_that_fits


def nearest(recipe: str, gpu: str, gpus: int, *overrides: str, memory_gib: float) -> str | None:
    profile = load_gpu_profile(gpu).model_copy(update={"memory_gib": memory_gib})
    config = load_config(REPO_ROOT / "configs" / f"{recipe}.yaml", overrides)
    return nearest_that_fits(config, FluxShape(), Cluster(profile, 1, gpus))


def test_a_change_of_the_config_comes_before_other_gpus():
    """Prodigy goes under engines that keep all on the GPU alone."""
    found = nearest("fill_lora", "24GB", 1, "train.optimizer=prodigy", "train.lr=1.0", memory_gib=24.0)
    assert found.startswith("model.precision=int8: single")


@pytest.mark.parametrize("devices, also", [("null", ""), ("[cuda:0]", " data.encoder_devices=null")])
def test_encoders_that_share_the_gpu_go_first(devices, also):
    online = ["data.mode=online", f"data.encoder_devices={devices}"]
    found = nearest("fill_lora", "40gb", 1, "train.activation_checkpointing=false", *online, memory_gib=75.0)
    assert found.startswith(f"data.mode=cached{also}: single")
    config = load_config(REPO_ROOT / "configs" / "fill_lora.yaml", ["data.mode=cached", *also.split()])
    assert config.data.mode == "cached"  # what is named can be given


def test_no_more_gpus_are_named_than_those_before_the_one_that_encodes():
    """--gpus-per-node 2 would train on one again."""
    online = ["data.mode=online", "data.encoder_devices=[cuda:1]"]
    assert "--gpus-per-node 2" in nearest("fill_lora", "24GB", 1, "model.precision=nf4", memory_gib=10.0)
    assert "--nodes 2" in nearest("fill_lora", "24GB", 1, "model.precision=nf4", *online, memory_gib=10.0)


def test_where_no_change_of_the_config_helps_a_larger_gpu_is_named():
    assert nearest("fill_full", "24GB", 8, memory_gib=5.0).startswith("--gpu 24gb: fsdp2-offload")


def test_what_fits_nowhere_has_no_nearest():
    config = load_config(REPO_ROOT / "configs" / "fill_full.yaml")
    model_of_a_trillion = FluxShape(width=30720)
    assert nearest_that_fits(config, model_of_a_trillion, Cluster(load_gpu_profile("24GB"), 1, 8)) is None
