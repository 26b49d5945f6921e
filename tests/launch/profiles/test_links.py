"""NVLink and network ports, from a driver and a sysfs stood in for."""

from pathlib import Path

import pytest

from launch.profiles.links import Ports, network_ports, nvlink_rates

NDR, HDR = "400 Gb/sec (4X NDR)", "200 Gb/sec (4X HDR)"


def test_active_links_are_counted_and_those_that_are_down_are_not(machine) -> None:
    machine("NVIDIA A100-SXM4-80GB", links=["25 GB/s"] * 10 + ["<inactive>", "0 GB/s"])
    assert nvlink_rates(0) == [25.0] * 10


def test_a_card_without_nvlink_and_a_machine_without_driver_have_none(machine, monkeypatch, tmp_path) -> None:
    machine("NVIDIA L40S")
    assert nvlink_rates(0) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvlink_rates(0) == []


@pytest.mark.parametrize(
    "rdma, ethernet, expected",
    [
        # As a DGX H100: eight ports for the GPUs, two for storage, and a management port.
        (
            [("InfiniBand", NDR, "4: ACTIVE")] * 8 + [("Ethernet", "200 Gb/sec (4X HDR)", "4: ACTIVE")] * 2,
            [("up", "10000")],
            Ports("InfiniBand", 8, 400.0),
        ),
        ([("Ethernet", "100 Gb/sec (4X EDR)", "4: ACTIVE")] * 4, [], Ports("RoCE", 4, 100.0)),
        ([("InfiniBand", HDR, "1: DOWN")], [("up", "25000"), ("up", "1000"), ("down", "-1")], Ports("Ethernet", 1, 25)),
        ([], [("up", "-1")], None),  # a virtual machine's
        ([], [], None),
    ],
)
def test_the_ports_that_nodes_talk_by_are_found(machine, rdma, ethernet, expected) -> None:
    assert network_ports(machine("NVIDIA H100 80GB HBM3", rdma=rdma, ethernet=ethernet)) == expected


def test_a_system_without_sysfs_has_none(tmp_path: Path) -> None:
    assert network_ports(tmp_path) is None


@pytest.mark.parametrize(
    "count, rate, gpus, each",
    [(8, 400, 8, 400), (10, 400, 8, 400), (32, 100, 8, 400), (4, 400, 8, 200), (1, 100, 8, 12.5), (1, 25, 1, 25)],
)
def test_each_gpu_has_whole_ports_or_a_share(count, rate, gpus, each) -> None:
    """32 x 100 are AWS's for eight GPUs; of ten ports two are not any GPU's."""
    assert Ports("InfiniBand", count, rate).for_each(gpus) == each
