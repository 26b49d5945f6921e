import json
import shutil

from launch.report.run import RunReader
from tests.launch.report.conftest import BEGIN, PACE


def test_a_whole_run_is_json_as_browsers_read_it(make_run):
    told = RunReader(make_run("a")).read()
    json.dumps(told, allow_nan=False)
    assert {"loss", "lr", "grad_norm", "samples_per_second", "peak_memory_gib", "data_wait_seconds"} == set(
        told["curves"]
    )
    assert told["curves"]["loss"]["x"] == told["clock"]["x"] == list(range(1, 201))
    assert told["curves"]["loss"]["y"][59] is None and told["undone"][0]["x"] == list(range(101, 121))
    assert told["clock"]["y"][:2] == [BEGIN + PACE, BEGIN + 2 * PACE], "to the second"
    assert told["validation"]["holdout"]["loss"] == {"x": [0, 100, 200], "y": [0.6, 0.6, 0.6]}
    assert told["status"]["step"] == 200 and told["status"]["best"] == {"hole_psnr": 25.0, "step": 200}


def test_what_comes_while_it_is_read_again_is_there(make_run):
    run = make_run("a")
    reader = RunReader(run)
    assert reader.read()["status"]["step"] == 200
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "loss": 0.25}\n')
    told = reader.read()
    assert told["status"]["step"] == 201 and told["curves"]["loss"]["y"][-1] == 0.25


def test_pictures_are_those_of_validations(make_run):
    run = make_run("a")
    (run / "samples" / "notes.txt").write_text("mine")
    assert RunReader(run).pictures()[100] == {
        "holdout": "step-00000100-holdout.png",
        "train": "step-00000100-train.png",
    }
    shutil.rmtree(run / "samples")
    assert RunReader(run).pictures() == {}


def test_damaged_and_missing_files_leave_the_rest_readable(make_run):
    run = make_run("a")
    for name in ("validation.jsonl", "events.jsonl", "starts.jsonl", "config.yaml", "metrics.1.jsonl"):
        (run / name).write_bytes(b'\xff\x00{"step": [}\n[1]\n{"step": "x", "time": {}, "holdout": 3, "event": []}\n')
    told = RunReader(run).read()
    json.dumps(told, allow_nan=False)
    assert told["curves"]["loss"]["x"][-1] == 200
    shutil.rmtree(run)
    assert RunReader(run).read()["curves"] == {}


def test_secrets_in_reasons_are_hidden(make_run):
    end = {"code": 1, "reason": "cannot open https://me:planted@host/x?sig=planted", "step": 200, "again": None}
    assert "planted" not in json.dumps(RunReader(make_run("a", end=end)).read())
