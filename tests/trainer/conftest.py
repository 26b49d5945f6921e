"""Real triples as the trainer sees them, beside the pipeline that judges it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.environment import process_of_before

if TYPE_CHECKING:
    from diffusers import FluxFillPipeline
    from PIL import Image

    from configs.schema import Config
    from data.batches.micro_batch import MicroBatch
    from data.batches.training_set import CachedTrainingSet
    from trainer.engines.base import Engine

TEXT_LENGTH = 64


@dataclass(frozen=True)
class RealTriple:
    """One of the demo's triples: its files as Pillow opens them, and as the model takes them.

    rows: a micro-batch of one, in fp32 where the cache would hold bf16.
    """

    target: "Image.Image"
    mask: "Image.Image"
    source: "Image.Image"
    caption: str
    rows: "MicroBatch"


@pytest.fixture(scope="session")
def pipeline(tiny_model: Path) -> "FluxFillPipeline":
    """FluxFillPipeline from the tiny model's folder, fp32, on the CPU. Its modules are not to be changed."""
    from diffusers import FluxFillPipeline

    pipeline = FluxFillPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def load_triple(tiny_model: Path, triples: Path) -> "Callable[..., RealTriple]":
    """load_triple(height, width, of=(h, w)): a demo triple of h x w pixels, from its files, for a bucket."""
    import torch
    from PIL import Image

    from configs.data_schema import EncodersConfig
    from data.batches.micro_batch import MicroBatch
    from data.batches.noise import draw_noise
    from data.encoders.encode import collate_pixels, encode_captions, encode_pixels
    from data.encoders.load import load_encoders
    from data.samples.geometry import Bucket, fit

    encoders = load_encoders(tiny_model, EncodersConfig(vae="cpu", clip="cpu", t5="cpu"), device_index=0)

    def load(height: int, width: int, *, of: tuple[int, int]) -> RealTriple:
        sizes = {path: Image.open(path).size for path in sorted((triples / "target").glob("*.png"))}
        target = next(path for path, size in sizes.items() if size == (of[1], of[0]))
        caption = target.with_suffix(".txt").read_text().strip()
        pictures = [Image.open(triples / role / target.name) for role in ("target", "mask", "source")]
        bucket = Bucket(height, width)
        pixels = fit(*pictures, bucket=bucket)
        encoded = encode_pixels(encoders.vae, collate_pixels([[pixels]]))
        latents, masked_latents = encoded.latents, encoded.masked_latents[0]
        text = encode_captions(encoders.text, [caption], text_length=TEXT_LENGTH)
        noise = torch.empty(1, 16, *bucket.latent_size)
        draw_noise(7, height * width, noise.numpy())
        rows = MicroBatch(
            bucket,
            is_last=True,
            latents=latents,
            masked_latents=masked_latents,
            mask=torch.from_numpy(np.packbits(pixels.mask, axis=-1)).unsqueeze(0),
            t5=text.t5,
            pooled=text.pooled,
            noise=noise,
            uniform=torch.full((1,), 0.5, dtype=torch.float64),
            weight=torch.ones(1),
            position=torch.zeros(1, dtype=torch.int64),
        )
        return RealTriple(*pictures, caption=caption, rows=rows)

    return load


@pytest.fixture(scope="session")
def config(tiny_model: Path, triples: Path, tmp_path_factory: pytest.TempPathFactory) -> "Config":
    """The demo's config over a preprocessed cache of 16 triples, 4 of them held out, with a short sampler.

    Its runs go below a tmp folder: give each a name of its own.
    """
    from PIL import Image
    from rich.console import Console

    from configs.loading import load_config
    from data.preprocessing.run import preprocess

    folder = tmp_path_factory.mktemp("trainer")
    for role in ("target", "mask", "source"):
        (folder / role).mkdir()
        for path in sorted((triples / role).iterdir()):
            if int(path.stem.rsplit("-", 1)[-1]) % 6 == 0:
                shutil.copy(path, folder / role)
    for path in (folder / "source").glob("*.png"):
        # The demo's source differs from the target in the hole alone; a real one does around it too (shadows).
        Image.open(path).point(lambda value: value * 0.9).save(path)
    overrides = [f"data.datasets.0.{role}={folder / role}" for role in ("target", "mask", "source")]
    overrides += [f"model.base={tiny_model}", f"data.cache={folder / 'cache'}", f"run.dir={folder / 'runs'}"]
    overrides += ["data.holdout=4", "validation.images=5", "validation.sampler_steps=2"]
    config = load_config(Path(__file__).parents[2] / "configs" / "demo.yaml", overrides)
    preprocess(config, Console(quiet=True))
    return config


@pytest.fixture(scope="session")
def samples(config: "Config", tiny_model: Path) -> "CachedTrainingSet":
    """Those of the config's cache."""
    from data.batches.training_set import CachedTrainingSet
    from data.cache.open_cache import open_cache

    return CachedTrainingSet(open_cache(config, tiny_model))


@pytest.fixture(scope="session")
def engine(config: "Config") -> "Engine":
    """The engine of this process alone, on the CPU."""
    from trainer.engines.start import start_engine

    with process_of_before():  # or what accelerate leaves would stay for all files that follow
        return start_engine(config)


@pytest.fixture
def rows(load_triple: "Callable[..., RealTriple]") -> "MicroBatch":
    """The input that outputs are compared on."""
    return load_triple(64, 64, of=(64, 64)).rows
