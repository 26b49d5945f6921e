"""Folders of small made-up pictures, and the triples that are found there."""

import zlib

import numpy as np
from PIL import Image

from configs.data_schema import CaptionsConfig, DataConfig
from configs.dataset_schema import DatasetConfig
from data.sources.problems import Findings
from data.sources.triples import list_triples


def make_files(folder, *names):
    """Pictures whose bytes and pixels are a function of their folder's and their own name; masks half white."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = zlib.crc32(f"{folder.name}/{name}".encode())
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        if folder.name == "mask":
            pixels[:8], pixels[8:] = 255, seed % 128
        if path.suffix.lower() in Image.registered_extensions():
            Image.fromarray(pixels).save(path)
        else:
            path.write_bytes(pixels.tobytes())


def dataset(folder, *, source=False):
    return DatasetConfig(
        name="cats",
        target=folder / "target",
        mask=folder / "mask",
        source=folder / "source" if source else None,
    )


def triples_of(folder, *, source=False, **captions):
    config = dataset(folder, source=source)
    data = DataConfig(cache=folder / "cache", datasets=[config], captions=CaptionsConfig(**captions))
    findings = Findings()
    triples = [each.triple for each in list_triples(config, data, lambda count: None, findings)]
    findings.raise_problems()
    return triples
