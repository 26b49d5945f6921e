"""What is exported of a checkpoint is what the run itself exports at that step."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from configs.errors import InputError
from configs.loading import dump_config
from data.storage.checkpoint_folders import checkpoint_folder
from tests.data.storage.small_disk import open_small_disk
from tests.ranks import run_ranks
from tests.trainer.adapters.live_models import lora
from tests.trainer.export.made_checkpoints import make_checkpoint
from trainer.export.from_checkpoint import choose_checkpoint, export_checkpoint, main

METHODS = {
    "full": "method={type: full}",
    "lora": "method={type: lora, rank: 4, alpha: 8}",
    "dora": "method={type: dora, rank: 4, alpha: 8}",
    "lokr": "method={type: lokr, rank: 2, alpha: 6, factor: 4}",
}
MODEL, ADAPTER = "transformer/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


def train(arguments: list[str]) -> int:
    """The trainer, in a forked rank."""
    from trainer.main import train

    return train(arguments)


@pytest.fixture(scope="module")
def run_of(config, tmp_path_factory):
    """run_of(method): the folder of a run of two steps with an average, by two processes of fsdp2; made once."""
    runs = tmp_path_factory.mktemp("exports")
    (runs / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    settings = [
        "train.steps=2",
        "train.warmup_steps=0",
        "train.ema_decay=0.5",
        "train.global_batch_size=2",
        "train.micro_batch_size=1",
    ]
    settings += ["checkpoint.every_steps=1", "validation.every_steps=null", "logging.trackers=[]", f"run.dir={runs}"]

    def run(method: str) -> Path:
        if not (runs / method).exists():
            line = ["--config", str(runs / "config.yaml"), f"run.name={method}", METHODS[method], *settings]
            run_ranks("fsdp2", 2, train, line)
        return runs / method

    return run


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize(
    "method", ["full", "lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "lokr"))]
)
def test_an_export_of_the_last_checkpoint_is_what_the_run_exported(run_of, tmp_path, method):
    run = run_of(method)
    for weights, place in (("live", "final"), ("ema", "final-ema")):
        out = tmp_path / weights
        export_checkpoint(run, out, weights=weights, dtype="fp32")
        mine, theirs = (
            {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for folder in (out, run / place)
        )
        assert mine == theirs  # the model card too
        found = metadata_of(out / (MODEL if method == "full" else ADAPTER))
        assert (found["fluxfill.step"], found["fluxfill.weights"]) == ("2", weights)


def test_dtype_and_step_are_those_asked_for(run_of, tmp_path):
    run = run_of("full")
    first = run / "checkpoints" / "step-00000001"
    export_checkpoint(first, tmp_path / "model")
    exported = load_file(tmp_path / "model" / MODEL)
    later = load_file(run / "final" / MODEL)
    assert all(tensor.dtype == torch.bfloat16 for tensor in exported.values())
    assert any(not torch.equal(exported[name], later[name].bfloat16()) for name in later)
    FluxFillPipeline.from_pretrained(tmp_path / "model")
    adapter = run_of("lora")
    export_checkpoint(adapter, tmp_path / "adapter", dtype="bf16")
    small = load_file(tmp_path / "adapter" / ADAPTER)
    whole = load_file(adapter / "final" / ADAPTER)
    assert all(torch.equal(small[name], tensor.bfloat16()) for name, tensor in whole.items())


def test_what_cannot_be_exported_is_told(run_of, config, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(run_of("lora"), run)
    (tmp_path / "there").mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    last = run / "checkpoints" / "step-00000002"
    for source, out, words in (
        (run, tmp_path / "there", r"--out .*there: is there already"),
        (tmp_path / "nowhere", tmp_path / "out", "there is no such folder"),
        (empty, tmp_path / "out", "holds no intact checkpoint"),
    ):
        with pytest.raises(InputError, match=words):
            export_checkpoint(source, out)
    index = json.loads((last / "index.json").read_text())
    (last / "index.json").write_text(json.dumps(index | {"more": 1}))
    with pytest.raises(InputError, match=r"index\.json does not match its sha256"):
        export_checkpoint(last, tmp_path / "out")
    assert main([str(last), "--out", str(tmp_path / "out")]) == 2
    assert "does not match" in capsys.readouterr().err
    # Of the run, the checkpoint before it is taken.
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert (tmp_path / "out" / ADAPTER).is_file() and not (tmp_path / "out.part").exists()


def test_an_average_that_was_not_kept_and_another_base_are_told(run_of, tiny_dev_model, tmp_path):
    source = run_of("lora") / "checkpoints" / "step-00000002"
    folder = tmp_path / "step-00000002"
    shutil.copytree(source, folder)
    (folder / "manifest.json").write_text("{}")
    index = json.loads((folder / "index.json").read_text())
    tensors = {name: parts for name, parts in index["tensors"].items() if not name.startswith("ema/")}
    (folder / "index.json").write_text(json.dumps(index | {"tensors": tensors}))
    with pytest.raises(InputError, match=r"no moving average.*--weights live"):
        export_checkpoint(folder, tmp_path / "out", weights="ema")
    text = (folder / "config.yaml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("base:"))
    (folder / "config.yaml").write_text(text.replace(line, f"  base: {tiny_dev_model}"))
    with pytest.raises(InputError, match=r"trained another model than .*tiny-dev"):
        export_checkpoint(folder, tmp_path / "out")


def test_a_base_that_was_moved_is_taken_from_where_it_lies_now(run_of, tiny_model, tmp_path):
    folder = tmp_path / "step-00000002"
    shutil.copytree(run_of("lora") / "checkpoints" / "step-00000002", folder)
    (folder / "manifest.json").write_text("{}")
    text = (folder / "config.yaml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("base:"))
    (folder / "config.yaml").write_text(text.replace(line, f"  base: {tmp_path / 'gone'}"))
    with pytest.raises(InputError, match=r"gone: no such folder"):
        export_checkpoint(folder, tmp_path / "out")
    export_checkpoint(folder, tmp_path / "out", base=str(tiny_model))
    assert (tmp_path / "out" / ADAPTER).is_file()


# --- which step, and the files ----------------------------------------------------------------------------------------


@pytest.fixture
def steps(tiny_model, tmp_path):
    """A run of three checkpoints, the last half-written, of which the first was validated best."""
    run = tmp_path / "sofa"
    for step in (3, 6, 9):
        folder, _ = make_checkpoint(tiny_model, lora(), run, step=step)
    (folder / "COMPLETE").unlink()
    lines = [{"step": step, "holdout": {"hole_psnr": psnr}} for step, psnr in ((3, 21.0), (6, 20.0), (9, 30.0))]
    (run / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return run


@pytest.mark.parametrize("asked, step", [(None, "6"), ("3", "3"), ("best", "3")])
def test_the_step_is_the_one_asked_for(steps, tmp_path, asked, step):
    assert main([str(steps), "--out", str(tmp_path / "out"), *(["--step", asked] if asked else [])]) == 0
    assert metadata_of(tmp_path / "out" / ADAPTER)["fluxfill.step"] == step
    assert f"| step | {step} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("", ["--step", "4"], "has no checkpoint of step 4. There are 3, 6"),
        ("", ["--step", "last"], "--step last: is no number, nor best. There are 3, 6"),
        ("", ["--step", "9"], "step-00000009: is half-written, or being written: it lacks its COMPLETE"),
        ("checkpoints/step-00000009", [], "step-00000009: is half-written, or being written"),
        ("checkpoints/step-00000003", ["--step", "3"], "is no run's folder"),
        ("", ["--format", "peft", "--dtype", "fp8"], "--dtype fp8 is for whole models"),
    ],
)
def test_bad_input_is_told_with_exit_code_2_and_nothing_is_left(steps, tmp_path, capsys, source, options, words):
    assert main([str(steps / source), "--out", str(tmp_path / "out"), *options]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))


def test_the_best_of_an_evaluation_goes_before_that_of_the_validation(steps, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fluxfill")
    (steps / "evaluation").mkdir()
    path = steps / "evaluation" / "evaluation.json"
    for step, found in ((6, 6), (4, 3)):  # of the checkpoint that is gone since there is nothing to export
        evaluated = {"version": 1, "weights": "ema", "steps": {"base": None, f"step {step}": step}}
        path.write_text(json.dumps(evaluated | {"best": {"step": f"step {step}"}}))
        assert choose_checkpoint(steps, "best", "ema") == checkpoint_folder(steps, found)
    assert "step-00000003: best by the validation of the live weights" in caplog.text


def test_the_best_of_an_evaluation_of_other_weights_is_not_taken(steps):
    (steps / "evaluation").mkdir()
    found = {"version": 1, "weights": "ema", "steps": {"step 6": 6}, "best": {"step": "step 6"}}
    (steps / "evaluation" / "evaluation.json").write_text(json.dumps(found))
    assert choose_checkpoint(steps, "best", "live") == checkpoint_folder(steps, 3)


def test_a_checkpoint_has_no_best_step(steps):
    with pytest.raises(InputError, match="is no run's folder"):
        choose_checkpoint(checkpoint_folder(steps, 3), "best")


def test_without_a_validation_there_is_no_best(steps, tmp_path, capsys):
    (steps / "validation.jsonl").unlink()
    assert main([str(steps), "--out", str(tmp_path / "out"), "--step", "best"]) == 2
    assert "was validated. Give a number: 3, 6." in capsys.readouterr().err


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "peft", "merged"])
def test_every_export_is_of_the_same_bytes(steps, tmp_path, form):
    for name in ("one", "two"):
        export_checkpoint(steps, tmp_path / name, form=form)
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) > 1


def test_an_export_with_another_velocity_is_not_kept(steps, tmp_path, monkeypatch):
    """Here the files are right, and what reads them turns one layer."""
    from trainer.export import from_checkpoint

    write = from_checkpoint.write_format

    def write_and_read_wrongly(*arguments):
        written = write(*arguments)
        return written._replace(
            read=lambda name: written.read(name) * (-1 if name.startswith("norm_out.linear") else 1)
        )

    monkeypatch.setattr(from_checkpoint, "write_format", write_and_read_wrongly)
    with pytest.raises(RuntimeError, match="another velocity than the run's"):
        export_checkpoint(steps, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def delete_next(steps, monkeypatch):
    """From now on steps of the run are deleted while they are exported, one in each try."""
    from trainer.export import from_checkpoint

    going = []

    def choose_late(*arguments):
        if going:
            shutil.rmtree(checkpoint_folder(steps, going.pop(0)))
        return choose_dtype(*arguments)

    choose_dtype = from_checkpoint.choose_dtype
    monkeypatch.setattr(from_checkpoint, "choose_dtype", choose_late)
    return going.extend


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_told_and_nothing_is_left(steps, tmp_path, capsys, delete_next):
    delete_next([6])
    assert main([str(steps), "--out", str(tmp_path / "out"), "--step", "6"]) == 2
    assert "step-00000006: was deleted while it was read" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_where_the_run_deletes_its_newest_meanwhile_the_newest_then_is_exported(
    steps, tmp_path, caplog, monkeypatch, delete_next
):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    export_checkpoint(checkpoint_folder(steps, 3), tmp_path / "three")
    delete_next([6])
    assert main([str(steps), "--out", str(tmp_path / "out")]) == 0
    assert "step-00000006: was deleted while it was read" in caplog.text
    files = [(folder / ADAPTER).read_bytes() for folder in (tmp_path / "out", tmp_path / "three")]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_a_run_that_deletes_faster_than_it_is_read_is_told_in_the_end(steps, tmp_path, capsys, delete_next):
    (checkpoint_folder(steps, 9) / "COMPLETE").touch()
    delete_next([9, 6, 3])
    assert main([str(steps), "--out", str(tmp_path / "out")]) == 2
    assert "step-00000003: was deleted while it was read" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["diffusers", "merged", "bfl"])
def test_a_disk_that_fills_up_is_told_with_exit_code_1_and_nothing_is_left(steps, tmp_path, capsys, form):
    with open_small_disk(tmp_path) as disk:
        out = disk.folder / "out"
        with disk.with_room_for(100_000):
            assert main([str(steps), "--out", str(out), "--format", form]) == 1
        told = capsys.readouterr().err
        assert f"{out}: cannot be written" in told and "free there" in told and "Traceback" not in told
        assert list(disk.folder.iterdir()) == []
