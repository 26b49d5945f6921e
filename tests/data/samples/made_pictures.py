"""Folders of small made-up pictures, and what is planned of them."""

import numpy as np
from PIL import Image
from rich.console import Console

from data.preprocessing.progress import open_progress
from data.preprocessing.worker import Worker
from data.samples.plan import plan_samples

QUIET = Console(quiet=True)


SIDE = 64


def write_pictures(folder, count=6):
    """folder/target/photos/00.png and so on, mask/ with a hole in the left half, captions for all but the first."""
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE)))
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[10 : 30 + number, 5:25] = 255
        for role, picture in (("target", pixels), ("mask", mask)):
            path = folder / role / "photos" / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            if role == "target" and number:
                path.with_suffix(".txt").write_text(f"caption {number % 2}")
    return folder


def folders(folder, **more):
    return {"name": "photos", "target": f"{folder}/target", "mask": f"{folder}/mask", **more}


def planned(config):
    with open_progress(QUIET, Worker()) as progress:
        return plan_samples(config, progress)
