"""Real runs of four steps that are to go on with another config."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.loading import dump_config, load_config
from data.encoders.model_folder import fingerprint
from tests.model_files import split_transformer
from tests.ranks import RankFailure, run_ranks
from trainer.checkpoints.compare import compare_configs, precision_of
from trainer.checkpoints.run_state import RunState, TrainedBase

SETTINGS = ["train.steps=4", "train.warmup_steps=0", "train.global_batch_size=2", "train.micro_batch_size=2"]
SETTINGS += ["validation.every_steps=null", "checkpoint.every_steps=2", "logging.trackers=[]", "train.lr=1e-3"]
SETTINGS += ["method={type: lora, rank: 2, alpha: 2, targets: [to_v]}", "train.optimizer=adamw"]


def train(arguments: list[str]) -> tuple[int, str]:
    """(steps that were reached, what was logged)."""
    import io
    import logging

    from trainer import main
    from trainer.process.outcome import AlreadyDone

    heard = io.StringIO()
    configure = main.configure_logging

    def with_copy(engine):
        console = configure(engine)
        logging.getLogger("fluxfill").addHandler(logging.StreamHandler(heard))
        return console

    main.configure_logging = with_copy
    try:
        return main.train(arguments), heard.getvalue()
    except AlreadyDone as done:
        return done.step, f"{heard.getvalue()}{done}"


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    """The folder of a run of four steps, with its config beside it."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    place = ["--config", str(folder / "config.yaml"), f"run.dir={folder}", "run.name=run"]
    assert run_ranks("single", 1, train, [*place, *SETTINGS])[0][0] == 4
    return folder


@pytest.fixture
def go_on(finished, tmp_path):
    """Goes on with a copy of the run: `go_on(*overrides, resume=...)`; (steps, what was logged)."""
    shutil.copytree(finished / "run", tmp_path / "run")

    def run(*overrides: str, resume: str = "auto") -> tuple[int, str]:
        place = ["--config", str(finished / "config.yaml"), f"run.dir={tmp_path}", "run.name=run"]
        return run_ranks("single", 1, train, [*place, *SETTINGS, *overrides, "--resume", resume])[0]

    return run


def refused(go_on, *overrides: str) -> str:
    with pytest.raises(RankFailure, match="InputError") as failure:
        go_on("train.steps=6", *overrides)
    return str(failure.value)


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def files(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "override, words",
    [
        ("method.alpha=4", "method.alpha is 4.0, the run has 2.0"),
        ("method.rank=4", "method.rank is 4, the run has 2"),
        ("model.precision=bf16", "model.precision is 'bf16', the run has 'fp32'"),
        ("train.optimizer=adamw8bit", "train.optimizer is 'adamw8bit', the run has 'adamw'"),
    ],
)
def test_what_would_be_another_runs_state_is_refused_by_key_with_both_values(go_on, tmp_path, override, words):
    before = files(tmp_path / "run")
    told = refused(go_on, override)
    assert words in told and "Set them back, or start a new run: run.name" in told
    assert files(tmp_path / "run") == before


def test_another_base_of_the_same_shapes_is_refused_and_the_same_one_in_other_files_elsewhere_is_not(
    go_on, tiny_model, tmp_path
):
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    split_transformer(moved)
    assert go_on("train.steps=5", f"model.base={moved}")[0] == 5
    file, _ = sorted((moved / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    told = refused(go_on, f"model.base={moved}")
    assert f"model.base is '{moved} (transformer " in told and f"the run has '{moved} (transformer " in told


def test_what_is_in_force_from_now_on_is_told_with_both_values_and_kept(go_on, tmp_path):
    run = tmp_path / "run"
    earlier = load_config(run / "config.yaml")
    steps, heard = go_on("train.steps=6", "flow.guidance=4", "checkpoint.every_steps=3")
    assert steps == 6
    assert "flow.guidance is 4.0, the run has 30.0: from now on, the guidance that the model is told" in heard
    assert "train.steps is 6, the run has 4: from now on, where the run ends, and the learning rate" in heard
    (resumed,) = [event for event in events(run) if event["event"] == "resumed"]
    assert {change["key"]: (change["before"], change["now"]) for change in resumed["changed"]} == {
        "flow.guidance": (30.0, 4.0),
        "train.steps": (4, 6),
    }
    assert (resumed["step"], resumed["restart"]) == (4, 1)
    assert load_config(run / "config.1.yaml") == earlier
    assert load_config(run / "config.yaml").flow.guidance == 4.0


def test_a_jump_of_the_learning_rate_is_told_with_both_rates_and_can_be_avoided(go_on, tmp_path):
    overrides = ["train.lr_schedule=linear", "train.lr_final_fraction=0.2"]
    _, heard = go_on("train.steps=8", *overrides)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last, following = f"{rates[3]:.3g}", f"{rates[4]:.3g}"
    assert f"learning rate: {last} at the last step" in heard and f"learning rate: {following} at the next one" in heard
    assert f"the learning rate jumps from {last} to {following}, as its schedule now ends at step 8" in heard
    assert "train.schedule_steps=4 lets it end where it did" in heard


def test_a_schedule_that_ends_before_the_run_leaves_the_rate_where_it_is(go_on, tmp_path):
    _, heard = go_on("train.steps=6", "train.lr_final_fraction=0.2", "train.schedule_steps=4")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates[4:] == pytest.approx([2e-4, 2e-4])
    assert "jumps" not in heard


def test_a_finished_run_that_is_started_again_says_so_and_writes_nothing(go_on, tmp_path):
    before = files(tmp_path / "run")
    steps, heard = go_on("train.lr=2e-3")
    assert steps == 4 and "all 4 steps are done. Nothing is left to train, and nothing was written" in heard
    assert files(tmp_path / "run") == before


def test_a_run_that_ended_before_its_export_is_exported(go_on, tmp_path):
    run = tmp_path / "run"
    (run / "events.jsonl").unlink()
    shutil.rmtree(run / "final")
    assert go_on()[0] == 4
    assert (run / "final").is_dir() and events(run)[-1]["event"] == "exported"


def test_fewer_steps_than_the_run_has_are_refused(go_on):
    with pytest.raises(RankFailure, match=r"train\.steps is 3, but .*step-00000004 has 4 steps"):
        go_on("train.steps=3")


def test_damaged_checkpoints_are_no_fresh_start_and_never_makes_one(go_on, tmp_path):
    run = tmp_path / "run"
    for state in (run / "checkpoints").glob("*/state.json"):
        state.write_text("{}")
    with pytest.raises(RankFailure, match=r"none of its 2 checkpoints is intact.*--resume never"):
        go_on()
    assert go_on(resume="never")[0] == 4
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [f"step-0000000{number}{end}" for number in (2, 4) for end in ("", ".undone")]
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]
    with pytest.raises(RankFailure, match="holds checkpoints already"):
        go_on(resume="never")


@pytest.mark.parametrize("kept", ["nothing", "fingerprint of its files"])
def test_a_checkpoint_from_before_bases_were_kept_by_their_content_goes_on(go_on, tiny_model, tmp_path, kept):
    run = tmp_path / "run"
    folder = run / "checkpoints" / "step-00000004"
    saved = json.loads((folder / "state.json").read_text())
    if kept == "nothing":
        del saved["state"]["base"]
    else:
        saved["state"]["base"]["fingerprint"] = fingerprint(tiny_model / "transformer")
    (folder / "state.json").write_text(json.dumps(saved))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert go_on("train.steps=5")[0] == 5


@pytest.mark.parametrize("log_changes", [True, False])
def test_what_all_ranks_find_is_said_by_one(config, tmp_path, caplog, monkeypatch, log_changes):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fluxfill")
    base = TrainedBase("0" * 64, "fp32")
    state = RunState(step=4, batch=4, skips=0, restarts=0, order=None, base=base)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1000})})
    compare_configs(tmp_path, longer, state, base, log_changes=log_changes)
    assert ("cannot be told" in caplog.text) == log_changes
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    changes = compare_configs(tmp_path, longer, state, base, log_changes=log_changes)
    assert [change.key for change in changes] == ["train.steps"]
    assert ("train.steps" in caplog.text) == ("learning rate: " in caplog.text) == log_changes


def test_the_precision_of_a_base_is_what_became_of_auto(config):
    def of(precision, dtype):
        return precision_of(config.model_copy(update={"model": config.model.model_copy(update=precision)}), dtype)

    assert of({"precision": "auto"}, torch.float32) == of({"precision": "fp32"}, torch.float32) == "fp32"
    assert of({"precision": "auto"}, torch.bfloat16) == of({"precision": "bf16"}, torch.bfloat16) == "bf16"
    assert of({"precision": "nf4"}, torch.bfloat16) == "nf4"
