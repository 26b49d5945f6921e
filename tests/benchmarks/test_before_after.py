import pytest
import torch
from peft.tuners.lora import Linear, LoraLayer
from rich.progress import Progress

from benchmarks.before_after import TINY_SIDE, add_adapter_of_peft, encode, measure
from benchmarks.mid_size import TEXT_LENGTH, make_config
from benchmarks.preprocess import write_pictures
from configs.data_schema import EncodersConfig
from data.batches.micro_batch import unpack_mask
from data.encoders.load import load_encoders
from data.samples.decode import load_pixels
from data.samples.plan import plan_samples
from demo.tiny_model import build_tiny_model
from trainer.adapters.build import add_adapter
from trainer.model.flux import load_transformer


def test_the_hand_made_trainer_sees_the_picture_its_mask_and_its_caption(tmp_path):
    write_pictures(tmp_path / "pictures", 1)
    build_tiny_model(tmp_path / "model")
    config = make_config(tmp_path, side=TINY_SIDE)
    (sample,) = plan_samples(config, Progress(disable=True))
    encoders = load_encoders(tmp_path / "model", EncodersConfig(), device_index=0)
    rows = encode(sample, encoders, config)
    (pixels,) = load_pixels(sample, config.data)
    assert torch.equal(unpack_mask(rows.mask)[0, 0].bool(), torch.from_numpy(pixels.mask))
    assert rows.latents.shape == rows.masked_latents.shape == (1, *sample.bucket.latent_shape)
    assert rows.t5.shape[:2] == (1, TEXT_LENGTH) and not torch.equal(rows.latents, rows.masked_latents)


def test_the_hand_made_trainers_adapter_is_pefts_own_on_the_layers_of_ours(tmp_path):
    build_tiny_model(tmp_path / "model")
    config = make_config(tmp_path, side=TINY_SIDE)
    theirs, ours = (load_transformer(tmp_path / "model", dtype=torch.bfloat16) for _ in range(2))
    add_adapter_of_peft(theirs, config)
    add_adapter(ours, config.method, expanded=False, seed=0)
    layers = [m for m in theirs.modules() if isinstance(m, LoraLayer)]
    assert layers and {type(layer) for layer in layers} == {Linear}
    trained = [{name: p.dtype for name, p in model.named_parameters() if p.requires_grad} for model in (theirs, ours)]
    assert trained[0] == trained[1] and {*trained[0].values()} == {torch.float32}


@pytest.mark.slow
def test_all_ways_make_steps_in_turn(tmp_path):
    line = measure(tmp_path, tiny=True, steps=1)
    assert {"naive", "in_loop", "ours", "ours_bf16", "ours_least"} == set(line["of_naive"])
    assert all(of["cpu_seconds"] > 0 and of["memory"] > 0 for of in line["of_naive"].values())
    assert line["of_naive"]["naive"] == {"seconds": 1.0, "cpu_seconds": 1.0, "memory": 1.0}
