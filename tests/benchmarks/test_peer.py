import pytest

from benchmarks.peer import measure


@pytest.mark.slow
def test_both_come_to_their_steps(tmp_path):
    line = measure(tmp_path, steps=12, repeats=1)
    assert set(line["seconds"]) == {"peer", "ours_cold", "ours_warm"}
    assert all(0 < of["cpu_step"] < of["cpu_first_step"] for of in line["seconds"].values())
