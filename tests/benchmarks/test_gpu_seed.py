import torch

from benchmarks.gpu_case import RECIPE, prepare
from benchmarks.gpu_inputs import FLUX, TINY, random_weights
from benchmarks.gpu_seed import SeedTrainer, encoders
from configs.loading import load_config
from launch.check.model import Sizes


def test_the_encoders_are_of_the_published_sizes():
    with torch.device("meta"):
        vae, clip, t5 = (sum(p.numel() for p in part.parameters()) for part in encoders(FLUX.shape, small=False))
    assert (vae, clip + t5) == (Sizes(FLUX.shape).vae, Sizes(FLUX.shape).text)


def test_a_step_trains_the_adapter_and_nothing_else(tmp_path):
    config = load_config(RECIPE, prepare(TINY, ["run.name=x"], tmp_path, side=512, samples=1))
    transformer = random_weights(torch.device("cpu"))(tmp_path / "model-tiny", dtype=torch.bfloat16)
    trainer = SeedTrainer(transformer, config, torch.device("cpu"), side=32, small=True)
    before = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    assert trainer.step() > 0
    changed = {name for name, weight in transformer.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lora_B" in name for name in changed) and all("lora_" in name for name in changed)
    assert trainer.tokens == 4 + TINY.text
