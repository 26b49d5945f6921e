from benchmarks.checkpoint import WAYS, measure


def test_every_way_saves_in_its_turn(tmp_path):
    line = measure(tmp_path, rounds=1, tiny=True)
    assert set(line["stall_seconds"]) == set(line["memory_of_checkpoint"]) == set(WAYS)
    assert all(seconds > 0 for seconds in line["stall_seconds"].values())
    assert line["gib"] > 0.01 and line["step_seconds"] > 0
    assert (tmp_path / "plain.pt").stat().st_size > 0.6 * line["gib"] * 2**30
