import socket
from pathlib import Path

import pytest

from configs.errors import InputError
from launch.slurm.allocation import choose_port, head_address, interface_address, read_allocation

JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]"}


def test_what_a_job_was_given_is_read_from_its_own_variables() -> None:
    given = read_allocation(JOB | {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"})
    assert (given.number, given.num_nodes, given.gpus_per_node, given.cpus_per_node) == ("77", 2, 8, 64)
    assert (read_allocation(JOB).gpus_per_node, read_allocation(JOB).cpus_per_node) == (0, 1)


def test_outside_of_a_job_and_with_uneven_nodes_is_refused() -> None:
    with pytest.raises(InputError, match="this is no SLURM job"):
        read_allocation({})
    with pytest.raises(InputError, match="Give --gpus-per-node"):
        read_allocation(JOB | {"SLURM_GPUS": "4", "SLURM_GPUS_ON_NODE": "3"})


def test_a_job_submitted_from_within_salloc_gpus_has_its_own() -> None:
    """sbatch hands the outer allocation's SLURM_GPUS on; what the job itself asked for is per node."""
    given = read_allocation(JOB | {"SLURM_GPUS": "4", "SLURM_GPUS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"})
    assert given.gpus_per_node == 2


def test_jobs_and_their_restarts_meet_at_different_ports() -> None:
    ports = {choose_port(str(number), restarts) for number in range(1_000_000, 1_000_100) for restarts in range(5)}
    assert len(ports) == 500
    assert min(ports) >= 10_000 and max(ports) < 30_000


def local_addresses() -> list[str]:
    """Of this machine, but for 127.0.0.1."""
    found = []
    for _, name in socket.if_nameindex():
        try:
            found.append(interface_address(name))
        except InputError:  # an interface without one
            continue
    return [address for address in found if not address.startswith("127.")]


OTHER_NODE = "192.0.2.77"  # nobody's


def reaches_other_node() -> bool:
    """Whether this machine has a way there, from an address of its own; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((OTHER_NODE, 9))
        except OSError:
            return False
        return probe.getsockname()[0] in local_addresses()


@pytest.fixture
def last_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`last_node(name)` is the name of the allocation's last node, as scontrol tells it."""

    def name(node: str) -> None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho first\necho {node}\n")
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return name


def test_nodes_meet_at_the_interface_that_was_named() -> None:
    assert head_address(read_allocation(JOB), "lo") == interface_address("lo") == "127.0.0.1"
    with pytest.raises(InputError, match=r"slurm\.interface is ib9, which has no address.*Interfaces there: .*lo"):
        head_address(read_allocation(JOB), "ib9")


@pytest.mark.skipif(not reaches_other_node(), reason="this machine has no way to others but its own loopback")
def test_else_at_the_one_that_leads_to_the_other_nodes(last_node) -> None:
    last_node(OTHER_NODE)
    assert head_address(read_allocation(JOB), None) in local_addresses()


@pytest.mark.parametrize(
    "node, message",
    [("localhost", "takes the job's node localhost for itself"), ("no.such.node.invalid", "by its name")],
)
def test_never_at_localhost_unasked(last_node, node: str, message: str) -> None:
    last_node(node)
    with pytest.raises(InputError, match=rf"{message}.*Set slurm\.interface"):
        head_address(read_allocation(JOB), None)


def test_one_node_needs_no_network() -> None:
    assert head_address(read_allocation(JOB | {"SLURM_JOB_NUM_NODES": "1"}), None) == "127.0.0.1"
