"""What benchmarks/gpu.py trains on: a model folder without weights, weights drawn on the device, and caches of made-up
latents in real shards."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from configs.cache_settings import manifest_settings, picture_settings
from configs.flux_shape import DEV_CHANNELS, FluxShape
from configs.schema import Config
from data.cache.manifest import FORMAT_VERSION, Manifest, ShardTable, write_manifest
from data.cache.shard_index import count_hole_fractions
from data.cache.shard_writer import SampleTensors, ShardWriter
from data.cache_layout import EMPTY_TEXT
from data.encoders.model_folder import PARTS, encoder_fingerprints
from data.samples.geometry import Bucket
from data.samples.plan import HOLDOUT, TRAIN
from trainer.model.flux import empty_transformer

_DATASET = "triples"  # of configs/fill_lora.yaml


@dataclass(frozen=True)
class Sizes:
    """name: of its folders.  shape: of the model.  sides: what stands for 1024 and 512 px.  text: tokens."""

    name: str
    shape: FluxShape
    sides: dict[int, int]
    text: int


FLUX = Sizes("flux", FluxShape(), {1024: 1024, 512: 512}, 512)
TINY = Sizes("tiny", FluxShape(1, 2, width=256, text_width=64, pooled_width=32), {1024: 64, 512: 32, 256: 128}, 48)


def write_model(folder: Path, shape: FluxShape) -> None:
    """A model folder of a shape, as far as a run on a cache looks into it. Weights are drawn, and a file of them
    has one number, or a run would find its base incomplete."""
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"made for": f"benchmarks, {part}"}))
    (folder / "model_index.json").write_text("{}")
    rows = shape.head_width * 7 // 16 // 2 * 2  # FLUX.1's shares are 16, 56 and 56 of 128
    config = {
        "_class_name": FluxTransformer2DModel.__name__,
        "in_channels": shape.in_channels,
        "out_channels": DEV_CHANNELS,
        "num_layers": shape.double_blocks,
        "num_single_layers": shape.single_blocks,
        "attention_head_dim": shape.head_width,
        "num_attention_heads": shape.width // shape.head_width,
        "joint_attention_dim": shape.text_width,
        "pooled_projection_dim": shape.pooled_width,
        "guidance_embeds": True,
        "axes_dims_rope": [shape.head_width - 2 * rows, rows, rows],
    }
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file({"drawn": torch.zeros(1)}, folder / "transformer" / "diffusion_pytorch_model.safetensors")


def random_weights(device: torch.device) -> Callable[..., FluxTransformer2DModel]:
    """In the place of `load_transformer`: the same weights for a device and a shape, every time, in bf16's numbers."""

    def load(model: Path, *, dtype: torch.dtype) -> FluxTransformer2DModel:
        transformer = empty_transformer(model, dtype=dtype).to_empty(device=device)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for name, weight in transformer.named_parameters():
                if weight.ndim > 1:
                    drawn = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
                    weight.copy_(drawn.normal_(0, weight.shape[1] ** -0.5, generator=generator))
                else:
                    weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        return transformer

    return load


def write_cache(config: Config, model: Path, shape: FluxShape, *, side: int, samples: int) -> None:
    """The cache of a config, of one shard with made-up samples of side x side pixels, all with one caption."""
    folder, bucket = Path(config.data.cache), Bucket(side, side)
    random = torch.Generator().manual_seed(side)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=random).bfloat16()

    length = config.data.captions.text_length
    text = {"t5": draw(length, shape.text_width), "pooled": draw(shape.pooled_width)}
    path = f"shards/{_DATASET}/{bucket}-000000.tar"
    with ShardWriter(folder / path) as writer:
        writer.add_text("text-0", **text)
        for number in range(samples):
            mask = np.zeros((side, side), dtype=bool)
            mask[side // 4 : side // 2, : side // 2] = True
            latents, masked = draw(*bucket.latent_shape), draw(*bucket.latent_shape)
            writer.add_sample(SampleTensors(f"sample-{number}", latents, [masked], [mask], "text-0", length, {}))
        index = writer.finish(plan="0" * 32)
    save_file(text, folder / EMPTY_TEXT)
    columns = {
        "path": path,
        "dataset": _DATASET,
        "bucket": str(bucket),
        "split": TRAIN,
        "samples": samples,
        "bytes": index.tar_bytes,
        "sha256": index.tar_sha256,
        "plan": index.plan,
    }
    (dataset,) = config.data.datasets
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        order_version=1,
        settings=manifest_settings(config.data) | picture_settings(dataset),
        encoders=encoder_fingerprints(model),
        vae_shift=0.1159,
        vae_scale=0.3611,
        text_length=length,
        text_dtype="bf16",
        text_width=shape.text_width,
        pooled_width=shape.pooled_width,
        mask_variants={_DATASET: 1},
        samples={_DATASET: {TRAIN: samples, HOLDOUT: 0}},
        hole_fractions={_DATASET: count_hole_fractions([index])},
    )
    write_manifest(folder, manifest, ShardTable(**{name: np.array([value]) for name, value in columns.items()}))
