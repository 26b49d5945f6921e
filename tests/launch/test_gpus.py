"""The driver's answer, from a script in its place."""

from pathlib import Path

import pytest

from configs.data_schema import DataConfig
from configs.errors import InputError
from configs.loading import load_config
from configs.slurm_schema import SlurmConfig
from launch.command import REPO_ROOT
from launch.gpus import Gpu, gpu_of_nodes, gpus_of_a_node, idle_gpus, list_gpus, refuse_missing_gpus

ANSWER = """\
0, NVIDIA H200, 143771, 512, 580.65.06, 9.0, GPU-aaaa
1, NVIDIA H200, 143771, 71885, 580.65.06, 9.0, GPU-bbbb
2, NVIDIA GB10, [N/A], [N/A], 580.65.06, 12.1, GPU-cccc
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{ANSWER}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_name_memory_driver_and_capability_are_read(driver):
    first, second, shared = list_gpus({})
    assert first == Gpu(0, "NVIDIA H200", 143771 / 1024, 0.5, "580.65.06", (9, 0))
    assert second.used_gib == pytest.approx(70.2, abs=0.01)
    assert shared.memory_gib == 0.0 and shared.capability == (12, 1)


@pytest.mark.parametrize(
    "visible, indexes", [("1,0", [1, 0]), ("GPU-bb", [1]), ("", []), ("-1", []), ("0,7,1", [0]), ("2", [2])]
)
def test_those_that_the_user_allows_are_in_the_users_order(visible, indexes, driver):
    assert [gpu.index for gpu in list_gpus({"CUDA_VISIBLE_DEVICES": visible})] == indexes


def test_a_machine_without_a_driver_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus({}) == []


def _data(*overrides: str) -> DataConfig:
    return load_config(REPO_ROOT / "configs" / "fill_lora.yaml", overrides).data


@pytest.mark.parametrize("num_gpus, there", [(1, "cuda:0 is the only GPU"), (2, "there are 2 GPUs, from cuda:0 on")])
def test_an_encoder_on_a_gpu_that_is_not_there_is_refused_with_the_ways_out(num_gpus, there):
    data = _data("data.mode=online", "data.encoder_devices=[cuda:0, cuda:9]")
    ways = r"Name one of those, leave the key out .* \(slurm\.gpus_per_node=10\)"
    with pytest.raises(InputError, match=f"data.encoder_devices names cuda:9, but .* {there}. {ways}"):
        refuse_missing_gpus(data, num_gpus)
    refuse_missing_gpus(data, 10)
    refuse_missing_gpus(data, 0)  # unknown


@pytest.mark.parametrize("key", ["vae", "clip", "t5"])
def test_each_encoders_own_device_counts_while_it_encodes_online(key):
    with pytest.raises(InputError, match=f"data.encoders.{key} names cuda:2, "):
        refuse_missing_gpus(_data("data.mode=online", f"data.encoders.{key}=cuda:2"), 2)
    for fine in ("cpu", "cuda", "auto", "cuda:1"):
        refuse_missing_gpus(_data("data.mode=online", f"data.encoders.{key}={fine}"), 2)
    refuse_missing_gpus(_data(f"data.encoders.{key}=cuda:2"), 2)  # on the GPUs of whoever preprocesses


@pytest.mark.parametrize(
    "slurm, gpus",
    [({}, None), ({"gpus_per_node": 4, "gpu": "h100-80gb"}, 4), ({"gpu": "h100-80gb"}, 8), ({"gpu": "rtx4090"}, None)],
)
def test_the_gpus_of_a_node_are_those_of_the_key_or_of_the_profile(slurm, gpus):
    assert gpus_of_a_node(SlurmConfig(**slurm)) == gpus


def test_a_profile_that_is_not_there_is_refused_by_its_key_even_where_it_tells_nothing():
    with pytest.raises(InputError, match=r"slurm\.gpu: foo: there is no such GPU\."):
        gpus_of_a_node(SlurmConfig(gpu="foo", gpus_per_node=2))
    assert gpu_of_nodes(SlurmConfig()) is None and gpu_of_nodes(SlurmConfig(gpu="mi300x")).is_amd


def test_gpus_are_idle_where_a_step_has_fewer_samples():
    config = load_config(REPO_ROOT / "configs" / "fill_lora.yaml")
    assert idle_gpus(config, 16) is None and idle_gpus(config, 17).startswith("Only 16 of 17 GPUs have a sample")
