import os
from pathlib import Path

import pytest

from configs.flux_shape import FluxShape
from configs.loading import load_config
from launch.check.model import Sizes
from launch.preflight import host_memory
from launch.preflight.host_memory import check_host_memory, host_limit

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(
    "engine, node, gib",
    [
        ("fsdp2", 0, 111 / 2),  # a save, of which both nodes hold their share
        ("fsdp2", 1, 111 / 2),
        ("hsdp", 0, 111),  # the first node saves for all
        ("hsdp", 1, 0),
    ],
)
def test_a_node_is_held_to_what_a_plan_counts_for_it(
    engine: str, node: int, gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "host_limit", lambda: 60 * 2**30)
    config = load_config(CONFIGS / "fill_full.yaml")
    [check] = check_host_memory(config, Sizes(FluxShape()), engine, node=node, nodes=2, processes=8)
    assert float(check.what.split()[0]) == pytest.approx(gib, rel=0.01)
    assert check.state == ("ok" if gib < 60 else "warning")


@pytest.mark.parametrize(
    "engine, limit, state, words",
    [
        ("hsdp", 60, "warning", "saves whose copies do not fit are written while training waits"),
        ("hsdp", 40, "error", "44.3 GiB for loading, of 40.0 that this node lets the job have"),  # 4 bytes a parameter
        ("fsdp2-offload", 300, "ok", "GiB for saving and states, of 300.0"),
        ("fsdp2-offload", 250, "warning", "saves whose copies do not fit"),
        ("fsdp2-offload", 150, "error", "GiB for loading and states, of 150.0"),
    ],
)
def test_a_save_that_has_no_room_for_its_copies_is_no_error(
    engine: str, limit: int, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training waits for it instead (docs/running.md): no reason to end the job."""
    monkeypatch.setattr(host_memory, "host_limit", lambda: limit * 2**30)
    config = load_config(CONFIGS / "fill_full.yaml")
    nodes = 1 if engine == "fsdp2-offload" else 2
    [check] = check_host_memory(config, Sizes(FluxShape()), engine, node=0, nodes=nodes, processes=8)
    assert check.state == state and words in check.what, check
    assert ("asynchronous" in check.cure) == (state == "warning")


def test_the_limit_is_the_smallest_of_the_machines_and_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    whole = host_limit()
    assert 0 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "64")
    assert host_limit() == 64 * 2**20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node's
    assert host_limit() == whole
