"""What is exported of a checkpoint is what the run itself exports at that step."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from configs.errors import InputError
from configs.loading import dump_config
from tests.ranks import run_ranks
from trainer.export.from_checkpoint import export_checkpoint, main

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
        files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(run / place) for path in (run / place).rglob("*") if path.is_file())
        name = MODEL if method == "full" else ADAPTER
        mine, theirs = load_file(out / name), load_file(run / place / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        assert metadata_of(out / name) == metadata_of(run / place / name)  # an adapter's settings


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
