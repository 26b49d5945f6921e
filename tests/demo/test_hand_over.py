"""One short run of the demo's model handed on: its report, its evaluation, and an export for every program, each read
by other code than what wrote it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from configs.loading import dump_config
from data.preprocessing.run import preprocess
from tests.ranks import run_ranks
from tests.trainer.adapters.live_models import NO_TEXT, assert_same_output
from tests.trainer.export.comfyui import patch
from trainer.adapters.merge import merge
from trainer.adapters.read import read_adapter
from trainer.evaluation.evaluate import main as evaluate
from trainer.evaluation.tuned_model import TunedModel, find_source
from trainer.export.bfl import bfl_tensors, read_from_bfl
from trainer.export.formats import FORMATS
from trainer.export.from_checkpoint import main as export
from trainer.export.velocity import velocity
from trainer.model.flux import load_transformer

METHODS = {"full": "method={type: full}", "lora": "method={type: lora, rank: 4, alpha: 8}"}
OF_FULL = {"diffusers", "comfyui", "bfl", "onefile"}
VOID = {"meta", "img", "input", "br", "link", "hr"}

pytestmark = pytest.mark.slow


def train(arguments: list[str]) -> int:
    """The trainer, in a forked rank."""
    from trainer.main import train

    return train(arguments)


@pytest.fixture(scope="module")
def run_of(demo_config, tmp_path_factory):
    """run_of(method): the folder of a run of four steps of the demo, validated and evaluated; made once."""
    folder = tmp_path_factory.mktemp("handed")
    config = folder / "config.yaml"
    settings = ["train.steps=4", "train.warmup_steps=0", "train.global_batch_size=4", "train.micro_batch_size=4"]
    settings += ["validation.every_steps=2", "validation.images=2", "validation.sampler_steps=2"]
    settings += ["checkpoint.every_steps=2", "logging.trackers=[]", f"run.dir={folder}", "train.lr=1e-3"]
    given = demo_config(folder / "cache", *settings)
    config.write_text(dump_config(given), encoding="utf-8")
    preprocess(given, Console(quiet=True))

    def make(method: str) -> Path:
        run = folder / method
        if not run.exists():
            run_ranks("single", 1, train, ["--config", str(config), f"run.name={method}", METHODS[method]])
            assert evaluate([str(run), "--images", "4", "--sampler-steps", "2", "--no-consistency"]) == 0
        return run

    return make


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


@pytest.mark.parametrize("method", METHODS)
def test_its_pages_are_whole(run_of, method, tmp_path):
    from typer.testing import CliRunner

    from launch.cli import app

    run = run_of(method)
    told = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "report.html")])
    assert told.exit_code == 0, told.output
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    Balanced(report)
    (shown,) = json.loads(re.search(r'id="data">(.*?)</script>', report, re.DOTALL)[1])["runs"]
    assert [grid["step"] for grid in shown["grids"]] == [0, 2, 4]
    evaluation = (run / "evaluation" / "evaluation.html").read_text(encoding="utf-8")
    Balanced(evaluation)
    assert all(label in evaluation for label in ("base", "step 2", "step 4"))


def loaded(model: Path, read) -> torch.nn.Module:
    """The base's model with other tensors."""
    transformer = load_transformer(model, dtype=torch.float32)
    transformer.load_state_dict({name: read(name).float() for name in transformer.state_dict()})
    return transformer


def read_back(form: str, method: str, folder: Path, model: Path) -> torch.nn.Module:
    """The transformer of an export, as the program that it is for would have it."""
    file = next(iter(folder.glob("*.safetensors")), folder)
    plain = load_transformer(model, dtype=torch.float32)
    if form == "merged" or (form == "diffusers" and method == "full"):
        return FluxFillPipeline.from_pretrained(folder, torch_dtype=torch.float32, **NO_TEXT).transformer
    if form == "diffusers":
        pipe = FluxFillPipeline.from_pretrained(model, **NO_TEXT)
        pipe.load_lora_weights(folder)
        return pipe.transformer
    if form == "peft":
        return PeftModel.from_pretrained(plain, folder).get_base_model()
    if form == "kohya":
        layers = read_adapter(file, plain).layers
        for name, factors in layers.items():
            weight = plain.get_submodule(name).weight
            weight.data.copy_(merge(weight.data, factors))
        return plain
    if form == "comfyui" and method == "lora":
        return patch(plain, file)
    if form == "onefile":
        return loaded(model, load_file(file).__getitem__)
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    return loaded(model, read_from_bfl(load_file(file).__getitem__, bfl_tensors(plain), shapes))


@pytest.mark.parametrize(
    "method, form",
    [(method, form) for method in METHODS for form in FORMATS if method == "lora" or form in OF_FULL],
    ids=lambda name: name,
)
def test_every_export_is_the_model_that_was_trained(run_of, tiny_model, tmp_path, method, form):
    run = run_of(method)
    live = TunedModel(find_source(run), torch.device("cpu"))
    live.load_checkpoint(run / "checkpoints" / "step-00000004")
    expected = velocity(live.transformer)
    assert (expected - velocity(load_transformer(tiny_model, dtype=torch.float32))).abs().max() > 1e-3
    out = tmp_path / "out"
    assert export([str(run), "--out", str(out), "--format", form, "--dtype", "fp32"]) == 0
    assert_same_output(velocity(read_back(form, method, out, tiny_model)), expected)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| step | 4 |" in card and "| hole_psnr |" in card and "![samples](samples.png)" in card
    assert (out / "samples.png").is_file() and (out / "evaluation.html").is_file()


def test_a_format_that_a_full_fine_tune_cannot_have_is_told(run_of, tmp_path, capsys):
    for form in set(FORMATS) - OF_FULL:
        assert export([str(run_of("full")), "--out", str(tmp_path / "out"), "--format", form]) == 2
        assert "this run trained the whole model" in capsys.readouterr().err
