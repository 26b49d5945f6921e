from pathlib import Path

import pytest

from launch.preflight.place import TOKEN, Place, find_place

TORCH = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


def test_under_torchs_launcher_the_first_rank_of_each_node_stands_for_it() -> None:
    assert find_place({**TORCH, "RANK": "4", "LOCAL_RANK": "0"}, None) == Place(1, 2, 4, "10.0.0.1", 29501, ())
    assert find_place({**TORCH, "RANK": "5", "LOCAL_RANK": "1"}, None) is None


def test_in_a_step_of_slurm_the_nodes_meet_at_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'n3\\nn4\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    step = {"SLURM_STEP_NODELIST": "n[3-4]", "SLURM_NODEID": "1", "SLURM_JOB_ID": "12", "SLURM_GPUS_ON_NODE": "8"}
    place = find_place(step, None)
    assert place is not None
    assert (place.rank, place.count, place.head, place.names, place.asked_gpus) == (1, 2, "n3", ("n3", "n4"), 8)
    first = find_place({**step, "SLURM_NODEID": "0"}, None)
    assert first is not None and first.port == place.port > 0


def test_the_token_of_a_job_is_taken_along_and_shown_nowhere() -> None:
    for environ in ({**TORCH, "RANK": "4", "LOCAL_RANK": "0"}, {}):
        place = find_place({**environ, TOKEN: "canary"}, None)
        assert place is not None and "canary" not in repr(place)
        assert place.token == ("canary" if environ else "")


def test_alone_it_is_this_machine() -> None:
    place = find_place({}, None)
    assert place is not None and (place.rank, place.count, place.processes, place.port) == (0, 1, 1, 0)
    assert place.name(0) == place.names[0] and place.name(1) == "node 1"
