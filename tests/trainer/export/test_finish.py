"""The end of a run, without the steps before it."""

import json

import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from configs.schema import FullConfig, LoraConfig
from trainer.engines.ema import Ema
from trainer.export.finish import export_and_verify
from trainer.method import build_transformer


@pytest.fixture
def end(config, engine, tmp_path):
    """Ends a run of a method on a base: `end(method, model, ema_decay, at_end)`; its folder."""

    def run(method, model, ema_decay=None, at_end=True):
        named = config.run.model_copy(update={"dir": tmp_path, "name": "ended"})
        checkpoint = config.checkpoint.model_copy(update={"at_end": at_end})
        ended = config.model_copy(update={"run": named, "method": method, "checkpoint": checkpoint})
        engine.prepare(build_transformer(ended, model, engine), torch.optim.AdamW)
        ema = Ema(engine.local_slices(), ema_decay)
        for average in ema.averages.values():
            average.add_(1.0)
        export_and_verify(ended, engine, model, ema)
        return ended.run.folder

    return run


def test_a_full_fine_tune_of_dev_ends_as_a_fill_pipeline(end, tiny_dev_model):
    """Whose published transformer config has no out_channels."""
    folder = end(FullConfig(type="full"), tiny_dev_model)
    transformer = FluxFillPipeline.from_pretrained(folder / "final").transformer
    assert (transformer.x_embedder.in_features, transformer.proj_out.out_features) == (384, 64)
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "final"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_end_says_what_it_is_and_takes_the_place_of_an_earlier_one(end, tiny_model, kind):
    method = {"lora": LoraConfig(type="lora", rank=2, alpha=2, targets=["to_v"]), "full": FullConfig(type="full")}[kind]
    folder = end(method, tiny_model)
    (folder / "final" / "of an earlier end").touch()
    folder = end(method, tiny_model)
    card = (folder / "final" / "README.md").read_text()
    assert "# ended" in card and f"trained on {tiny_model.name}" in card and "| weights | live |" in card
    assert ("load_lora_weights" in card) == (kind == "lora")
    file = next((folder / "final").rglob("transformer/*.safetensors" if kind == "full" else "*.safetensors"))
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["fluxfill.format"] == "diffusers"
    assert not (folder / "final" / "of an earlier end").exists() and not list(folder.glob("*.part"))


def test_the_average_is_written_beside_the_live_weights(end, tiny_model):
    folder = end(LoraConfig(type="lora", rank=2, alpha=2, targets=["to_v"]), tiny_model, ema_decay=0.9)
    live, average = (load_file(folder / name / "pytorch_lora_weights.safetensors") for name in ("final", "final-ema"))
    assert live.keys() == average.keys()
    assert all(torch.allclose(average[name], live[name] + 1.0) for name in live)


def test_without_an_average_that_of_an_earlier_end_goes(end, tiny_model):
    """It is of other weights than those beside it."""
    method = LoraConfig(type="lora", rank=2, alpha=2, targets=["to_v"])
    assert (end(method, tiny_model, ema_decay=0.9) / "final-ema").is_dir()
    folder = end(method, tiny_model)
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "final"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["exported"] * 2


def test_nothing_is_written_where_nothing_is_to_be_kept(end, tiny_model):
    method = LoraConfig(type="lora", rank=2, alpha=2, targets=["to_v"])
    assert not end(method, tiny_model, ema_decay=0.9, at_end=False).exists()
