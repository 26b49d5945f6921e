import os

from launch.report.json_log import JsonLog


def steps(log):
    return [line["step"] for line in log.read()]


def test_a_log_is_read_as_it_grows_and_half_a_line_waits_for_its_end(tmp_path):
    path, log = tmp_path / "metrics.jsonl", JsonLog(tmp_path / "metrics.jsonl")
    assert steps(log) == []
    path.write_text('{"step": 1}\n{"st')
    assert steps(log) == [1]
    with path.open("a") as file:
        file.write('ep": 2}\nnot JSON\n[3]\n{"step": 4}\n')
    assert steps(log) == [1, 2, 4] and steps(log) == [1, 2, 4]


def test_steps_that_were_set_aside_are_gone(tmp_path):
    """The trainer writes the kept lines to a new file in its place."""
    path, log = tmp_path / "metrics.jsonl", JsonLog(tmp_path / "metrics.jsonl")
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    assert steps(log) == [1, 2, 3, 4, 5]
    (tmp_path / "new").write_text('{"step": 1}\n{"step": 2}\n{"step": 30}\n{"step": 31}\n{"step": 32}\n{"step": 33}\n')
    os.replace(tmp_path / "new", path)
    assert steps(log) == [1, 2, 30, 31, 32, 33]
    path.unlink()
    assert steps(log) == []
