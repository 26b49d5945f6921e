"""Pictures/s of the preprocess job beside a bare loop that decodes and encodes the same pictures and does nothing else.

    python benchmarks/preprocess.py [--out benchmarks/results/preprocess.jsonl] [--pictures 96] [--repeats 7]

On a CPU, with a random VAE, CLIP and T5 of a middling size, large enough that encoding is most of the work, as it is on
a GPU. Three ways over the same pictures, in the same batches, with encoders that are loaded already, runs alternating:

    bare      one batch after the other: decode, encode pictures and captions; nothing is planned, written or kept
    in turn   the same, and each shard written by ShardWriter where it ends: what the job would be without overlap
    job       `preprocess` from an empty folder to a finished cache: planning (hashes, sizes, masks), shards, constants,
              validation pictures, manifest
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmarks.record import add_result
from configs.data_schema import EncodersConfig
from configs.flux_shape import LATENT_CHANNELS
from configs.loading import load_config
from configs.schema import Config
from data.cache.manifest import FORMAT_VERSION
from data.cache.shard_writer import SampleTensors, ShardWriter
from data.encoders.encode import collate_pixels, encode_captions, encode_pixels
from data.encoders.load import Encoders, load_encoders
from data.preprocessing.run import preprocess
from data.samples.decode import in_batches, load_pixels
from data.samples.plan import plan_samples
from data.samples.shard_plan import PlannedShard, plan_shards
from demo.tiny_model import build_tiny_model

ROOT = Path(__file__).parents[1]
T5_WIDTH, TEXT_LENGTH = 512, 128
CAPTION = "photograph {number}, with noise of its own and a caption that nobody else has"


def write_pictures(folder: Path, count: int) -> None:
    """JPEGs of 640 x 480 pixels, as smooth as photographs and with their grain, and PNG masks."""
    rng = np.random.default_rng(0)
    for role in ("target", "mask"):
        (folder / role).mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
        picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        picture.save(folder / "target" / f"{number:04d}.jpg", quality=90)
        (folder / "target" / f"{number:04d}.txt").write_text(CAPTION.format(number=number))
        mask = Image.new("L", picture.size)
        mask.paste(255, (100, 80, 400, 300))
        mask.save(folder / "mask" / f"{number:04d}.png")


def build_model(folder: Path) -> None:
    """The demo's model folder, its encoders replaced by larger random ones."""
    build_tiny_model(folder)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    t5 = json.loads((folder / "text_encoder_2" / "config.json").read_text())
    clip = json.loads((folder / "text_encoder" / "config.json").read_text())
    t5 |= {"d_model": T5_WIDTH, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 8}
    clip |= {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    for part, encoder in {
        "vae": vae,
        "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
        "text_encoder_2": T5EncoderModel(T5Config(**t5)),
    }.items():
        shutil.rmtree(folder / part)
        encoder.save_pretrained(folder / part)


def make_config(folder: Path, batch_size: int) -> Config:
    pictures = f"{{name: photos, target: {folder}/pictures/target, mask: {folder}/pictures/mask}}"
    overrides = [f"model.base={folder / 'model'}", f"data.cache={folder / 'cache'}", f"data.datasets=[{pictures}]"]
    overrides += ["data.resolution=256", f"data.captions.text_length={TEXT_LENGTH}", "data.holdout=0"]
    overrides += ["data.shard_size_mib=4", f"data.encode_batch_size={batch_size}"]
    return load_config(ROOT / "configs" / "demo.yaml", overrides)


def plan(config: Config) -> list[PlannedShard]:
    return plan_shards(
        plan_samples(config, Progress(disable=True)),
        size_limit=config.data.shard_size_mib << 20,
        text_bytes=TEXT_LENGTH * T5_WIDTH * 2,
        encoding={},
        format_version=FORMAT_VERSION,
    )


def run_in_turn(plans: Sequence[PlannedShard], encoders: Encoders, config: Config, *, write: bool) -> None:
    """Decode and encode batch by batch in this thread; `write` the shards too, or let the tensors go."""
    data = config.data
    for shard in plans:
        samples: list[SampleTensors] = []
        texts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        captions = {sample.text: sample.triple.caption for sample in shard.samples}
        for names in in_batches(captions, data.encode_batch_size):
            text = encode_captions(encoders.text, [captions[n] for n in names], text_length=TEXT_LENGTH)
            if write:
                texts |= {n: (text.t5[row].bfloat16(), text.pooled[row].bfloat16()) for row, n in enumerate(names)}
        for batch in in_batches(shard.samples, data.encode_batch_size):
            pixels = collate_pixels([load_pixels(sample, data) for sample in batch])
            encoded = encode_pixels(encoders.vae, pixels)
            if write:
                latents, masked = encoded.latents.bfloat16(), encoded.masked_latents.bfloat16()
                samples += [
                    SampleTensors(
                        key=sample.triple.key,
                        latents=latents[row],
                        masked_latents=list(masked[:, row]),
                        masks=list(pixels.masks[:, row].numpy()),
                        text=sample.text,
                        tokens=1,
                        meta={"caption": sample.triple.caption},
                    )
                    for row, sample in enumerate(batch)
                ]
        if write:
            with ShardWriter(data.cache_folder / shard.path) as writer:
                for name, (t5, pooled) in texts.items():
                    writer.add_text(name, t5=t5, pooled=pooled)
                for sample in samples:
                    writer.add_sample(sample)
                writer.finish(plan=shard.plan)


def measure(folder: Path, *, pictures: int, batch_size: int, repeats: int, threads: int) -> dict:
    """Pictures/s of the three ways, each the median of `repeats` alternating runs after one that warms up."""
    torch.set_num_threads(threads)
    write_pictures(folder / "pictures", pictures)
    build_model(folder / "model")
    config = make_config(folder, batch_size)
    encoders = load_encoders(folder / "model", EncodersConfig(), device_index=0)
    plans = plan(config)

    def run_job() -> None:
        with mock.patch("data.preprocessing.run.load_encoders", return_value=encoders):
            preprocess(config, Console(quiet=True))

    ways = {
        "bare": lambda: run_in_turn(plans, encoders, config, write=False),
        "in_turn": lambda: run_in_turn(plans, encoders, config, write=True),
        "job": run_job,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            shutil.rmtree(config.data.cache, ignore_errors=True)
            if repeat:
                rates[name].append(pictures / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "benchmark": "preprocess",
        "pictures": pictures,
        "side": 256,
        "shards": len(plans),
        "batch_size": batch_size,
        "vae_parameters": sum(p.numel() for p in encoders.vae.parameters()),
        "t5_parameters": sum(p.numel() for p in encoders.text.t5.parameters()),
        "repeats": repeats,
        **{f"{name}_pictures_per_s": round(value, 2) for name, value in medians.items()},
        "job_share_of_bare": round(medians["job"] / medians["bare"], 3),
        "job_times_in_turn": round(medians["job"] / medians["in_turn"], 3),
        "runs": {name: [float(f"{value:.4g}") for value in values] for name, values in rates.items()},
        "torch_threads": threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result here, as a JSON line")
    parser.add_argument("--folder", type=Path, help="where pictures and caches are written (default: the tmp folder)")
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; all cores by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="preprocess-benchmark-", dir=options.folder))
    try:
        result = measure(
            folder,
            pictures=options.pictures,
            batch_size=options.batch_size,
            repeats=options.repeats,
            threads=options.threads,
        )
    finally:
        shutil.rmtree(folder)
    add_result(result, options.out)


if __name__ == "__main__":
    main()
