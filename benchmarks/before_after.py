"""A training step before and after: the naive way, a competent way that encodes in the loop, and this trainer.

    python benchmarks/before_after.py [--out benchmarks/results/before_after.jsonl] [--steps 3] [--tiny]
    python benchmarks/before_after.py --count-only

Measured on a CPU, one thread each, random weights, one picture a step, the same model and pictures; processes make a
step in turn. On the demo's model, and on one with all of FLUX.1's layers and an eighth of their widths:

    naive      a hand-made trainer: VAE, CLIP, T5 and transformer loaded in fp32; each step decodes the files, encodes
               picture, picture with the hole and caption, and trains by AdamW in fp32; nothing is checkpointed
    in_loop    as an expert would write it: text encoders and base in bf16, autocast, every block checkpointed, fused
               AdamW; it encodes in the loop as well
    ours       trainer/main.py with its defaults, on a cache that was made before; on a CPU it computes in fp32
    ours_bf16  the same as a GPU would run it: bf16
    ours_least the same with every block checkpointed

Both hand-made trainers decode and encode by the functions that `fluxfill preprocess` calls; their LoRA is peft's own,
on the same layers. Memory is the most that was resident, above what imports take; ratios are medians over the turns.

Then FLUX.1-Fill itself on a pretended CUDA device (trainer/simulation): GiB by count, and seconds of an H100 by the
shares of its rates that `fluxfill plan` assumes. Nothing of that was measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from rich.console import Console
from rich.progress import Progress

from benchmarks.mid_size import PICTURES, SIDE, TEXT_LENGTH, arguments, make_config, make_inputs
from benchmarks.record import add_result
from benchmarks.turns import Turns, alternate, ratio, train_in_turns
from configs.data_schema import EncodersConfig
from configs.schema import Config
from data.batches.micro_batch import MicroBatch
from data.encoders.encode import collate_pixels, encode_captions, encode_pixels
from data.encoders.load import Encoders, load_encoders
from data.preprocessing.run import preprocess
from data.samples.decode import load_pixels
from data.samples.plan import PlannedSample, plan_samples
from trainer.adapters.targets import adapter_targets
from trainer.model.flow import flow_loss, mix_noise, region_weight, sample_sigma
from trainer.model.flux import load_transformer, pack_latents, predict_velocity

TINY_SIDE = 64


def train_in_loop(folder: Path, side: int, competent: bool, turns: Turns) -> None:
    """The two hand-made trainers."""
    config = make_config(folder, side=side)
    dtype = torch.bfloat16 if competent else torch.float32
    encoders = load_encoders(folder / "model", EncodersConfig(), device_index=0)
    transformer = load_transformer(folder / "model", dtype=dtype)
    add_adapter_of_peft(transformer, config)
    if competent:
        encoders.text.t5.to(dtype)
        encoders.text.clip.to(dtype)
        transformer.enable_gradient_checkpointing()
    transformer.train()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=competent)
    samples = plan_samples(config, Progress(disable=True))
    while True:
        for sample in samples:
            rows = encode(sample, encoders, config)
            sigma = sample_sigma(rows.uniform, rows.bucket.tokens, config.flow)
            noisy = mix_noise(rows.latents, rows.noise, sigma)
            with torch.autocast("cpu", dtype, enabled=competent):
                velocity = predict_velocity(transformer, noisy, rows, sigma, config.flow)
            region = region_weight(rows.hole, config.flow)
            flow_loss(velocity, pack_latents(rows.noise - rows.latents.float()), region).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            turns.end_step()


def add_adapter_of_peft(transformer: FluxTransformer2DModel, config: Config) -> None:
    """The same LoRA by diffusers and peft alone, in fp32, with peft's own arithmetic."""
    assert config.method.type == "lora"
    targets = adapter_targets(transformer, config.method)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=config.method.rank, lora_alpha=config.method.alpha, target_modules=targets))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def encode(sample: PlannedSample, encoders: Encoders, config: Config) -> MicroBatch:
    """One picture with its mask and caption, from the files."""
    pixels = collate_pixels([load_pixels(sample, config.data)])
    encoded = encode_pixels(encoders.vae, pixels)
    text = encode_captions(encoders.text, [sample.triple.caption], text_length=TEXT_LENGTH)
    packed = (pixels.masks[0].view(1, sample.bucket.height, -1, 8) * (1 << torch.arange(7, -1, -1))).sum(-1)
    return MicroBatch(
        bucket=sample.bucket,
        is_last=True,
        latents=encoded.latents,
        masked_latents=encoded.masked_latents[0],
        mask=packed.to(torch.uint8),
        t5=text.t5,
        pooled=text.pooled,
        noise=torch.randn_like(encoded.latents),
        uniform=torch.rand(1, dtype=torch.float64),
        weight=torch.ones(1),
        position=torch.zeros(1, dtype=torch.int64),
    )


def train_ours(folder: Path, more: tuple[str, ...], side: int, turns: Turns) -> None:
    """The trainer of this project."""
    train_in_turns(arguments(folder, *more, side=side), turns)


def ways(folder: Path, side: int) -> dict[str, Callable[[Turns], None]]:
    bf16 = ("model.precision=bf16",)
    ours = {"ours": (), "ours_bf16": bf16, "ours_least": (*bf16, "train.activation_checkpointing=true")}
    return {
        "naive": partial(train_in_loop, folder, side, False),
        "in_loop": partial(train_in_loop, folder, side, True),
        **{name: partial(train_ours, folder, (*settings, f"run.name={name}"), side) for name, settings in ours.items()},
    }


def measure(folder: Path, *, tiny: bool, steps: int) -> dict[str, Any]:
    """Medians of `steps` alternating steps after one that warms up, and the largest resident memory."""
    side = TINY_SIDE if tiny else SIDE
    make_inputs(folder, tiny=tiny)
    preprocess(make_config(folder, side=side), Console(quiet=True))
    made = alternate(ways(folder, side), steps=steps)
    naive = made["naive"]
    return {
        "benchmark": "before_after",
        "model": "tiny" if tiny else "middling",
        "side": side,
        "steps": steps,
        "pictures": PICTURES,
        "of_naive": {
            name: {
                "seconds": round(ratio(way.wall, naive.wall), 3),
                "cpu_seconds": round(ratio(way.cpu, naive.cpu), 3),
                "memory": round(way.peak / naive.peak, 3),
            }
            for name, way in made.items()
        },
        "naive_cpu_seconds": round(statistics.median(naive.cpu), 3),
        "naive_mib": round(naive.peak / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the results to this file, a JSON line each")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="the demo's model alone")
    parser.add_argument("--count-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    for tiny in () if options.count_only else (True,) if options.tiny else (True, False):
        with tempfile.TemporaryDirectory() as folder:
            line = measure(Path(folder), tiny=tiny, steps=options.steps)
        add_result(line, options.out)
    if options.tiny:
        return
    # In a process of its own: the pretended device has to stand before torch is imported.
    counting = subprocess.run(
        [sys.executable, "-m", "benchmarks.count_flux"], check=True, stdout=subprocess.PIPE, text=True
    )
    for counted in counting.stdout.splitlines():
        add_result(json.loads(counted), options.out)


if __name__ == "__main__":
    main()
