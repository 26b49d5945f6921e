"""The end of a run, without the steps before it."""

import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors.torch import load_file

from configs.schema import FullConfig, LoraConfig
from trainer.engines.ema import Ema
from trainer.export.finish import export_and_verify
from trainer.method import build_transformer


@pytest.fixture
def end(config, engine, tmp_path):
    """Ends a run of a method on a base: `end(method, model, ema_decay)`; its folder."""

    def run(method, model, ema_decay=None):
        named = config.run.model_copy(update={"dir": tmp_path, "name": "ended"})
        ended = config.model_copy(update={"run": named, "method": method})
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
    assert [path.name for path in folder.iterdir()] == ["final"]


def test_the_average_is_written_beside_the_live_weights(end, tiny_model):
    folder = end(LoraConfig(type="lora", rank=2, alpha=2, targets=["to_v"]), tiny_model, ema_decay=0.9)
    live, average = (load_file(folder / name / "pytorch_lora_weights.safetensors") for name in ("final", "final-ema"))
    assert live.keys() == average.keys()
    assert all(torch.allclose(average[name], live[name] + 1.0) for name in live)
