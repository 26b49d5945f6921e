"""The profile of a machine, whose driver and sysfs are stood in for."""

from pathlib import Path

import pytest

from configs.errors import InputError
from configs.gpu_profiles import GpuProfile, load_gpu_profile, read_profile
from launch.profiles.detect import missing_rates, render_profile

DGX = [("InfiniBand", "400 Gb/sec (4X NDR)", "4: ACTIVE")] * 8


def detected(system: Path, tmp_path: Path, **environment: str) -> GpuProfile:
    """As a plan reads it."""
    path = tmp_path / "mine.yaml"
    path.write_text(render_profile(environment, system))
    return read_profile(path)


def test_a_known_node_gets_what_is_found_and_its_makers_rates(machine, tmp_path) -> None:
    system = machine("NVIDIA H100 80GB HBM3", links=["26.562 GB/s"] * 18, rdma=DGX, ethernet=[("up", "10000")])
    found, known = detected(system, tmp_path), load_gpu_profile("h100-80gb")
    assert found == known.model_copy(update={"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6})
    text = (tmp_path / "mine.yaml").read_text()
    assert "nvlink_gb_s: 900 # as in h100-80gb.yaml; nvidia-smi: 18 links of 26.562 GB/s each way" in text
    assert "nic_gbit_s: 400 # 8 x 400 Gbit/s of InfiniBand for 8 GPUs" in text
    assert missing_rates(text) == []


def test_what_a_machine_has_less_of_than_the_known_node_is_told(machine, tmp_path) -> None:
    """Four GPUs, a third of the links, one slow port."""
    system = machine("NVIDIA H200", mib=143771, count=4, links=["26.562 GB/s"] * 6, ethernet=[("up", "100000")])
    found = detected(system, tmp_path)
    assert (found.gpus_per_node, found.nvlink_gb_s, found.nic_gbit_s) == (4, pytest.approx(318.7), 25.0)
    assert found.memory_gib == 140.4 and found.memory_bandwidth_gb_s == 4800


@pytest.mark.parametrize(
    "name, mib, known",
    [
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-80gb"),
        ("NVIDIA B200", 183359, "b200-180gb"),
        ("NVIDIA L40S", 46068, "l40s-48gb"),
        ("NVIDIA GeForce RTX 3090", 24576, "rtx3090-24gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 5090", 32607, "rtx5090-32gb"),
    ],
)
def test_the_drivers_name_of_each_known_card_is_known(machine, tmp_path, name, mib, known) -> None:
    found, profile = detected(machine(name, mib=mib), tmp_path), load_gpu_profile(known)
    for key in ("bf16_tflops", "fp8_tflops", "memory_bandwidth_gb_s"):
        assert getattr(found, key) == getattr(profile, key)


@pytest.mark.parametrize(
    "name, mib, near",
    [
        ("NVIDIA H100 PCIe", 81559, "h100-80gb, the card of the nearest name, has 989.5"),  # and this one 756
        ("NVIDIA H200 NVL", 143771, "h200-141gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 3090 Ti", 24564, "rtx3090-24gb"),
        ("NVIDIA A100-SXM-64GB", 65536, "a100-80gb"),  # Leonardo's
        ("NVIDIA GH200 480GB", 97871, None),
        ("NVIDIA L40", 46068, None),
    ],
)
def test_another_card_of_a_known_name_gets_no_rates_of_it(machine, tmp_path, name, mib, near) -> None:
    found = detected(machine(name, mib=mib), tmp_path)
    assert (found.bf16_tflops, found.memory_bandwidth_gb_s) == (None, None)
    text = (tmp_path / "mine.yaml").read_text()
    assert missing_rates(text) == ["bf16_tflops", "memory_bandwidth_gb_s"]
    assert "nearest name" not in text if near is None else near in text


def test_a_bridge_between_two_cards_counts_where_the_known_card_has_none(machine, tmp_path) -> None:
    found = detected(machine("NVIDIA GeForce RTX 3090", mib=24576, count=2, links=["14.062 GB/s"] * 4), tmp_path)
    assert found.nvlink_gb_s == 112.5 and found.gpus_per_node == 2


def test_the_gpus_are_those_the_user_allows(machine, tmp_path) -> None:
    system = machine("NVIDIA H100 80GB HBM3")
    assert detected(system, tmp_path, CUDA_VISIBLE_DEVICES="0,3").gpus_per_node == 2


def test_where_no_profile_can_be_made_it_says_why(machine, tmp_path, monkeypatch) -> None:
    system = machine("NVIDIA GeForce RTX 3090", "NVIDIA T400 4GB", count=1)
    with pytest.raises(InputError, match=r"several kinds are here: NVIDIA GeForce RTX 3090, NVIDIA T400 4GB.*VISIBLE"):
        render_profile({}, system)
    assert "RTX 3090" in render_profile({"CUDA_VISIBLE_DEVICES": "0"}, system)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"No GPU is here: nvidia-smi lists none.*srun"):
        render_profile({}, system)


def test_a_card_that_shares_the_hosts_memory_has_no_size_to_write(machine) -> None:
    system = machine("NVIDIA GB10", mib="[N/A]", count=1)
    with pytest.raises(InputError, match="GB10 shares the host's memory"):
        render_profile({}, system)
