"""The job that several workers share, for its tests."""

import numpy as np
from PIL import Image
from rich.console import Console

from data.cache.manifest import read_shard_table

QUIET = Console(quiet=True)


PICTURES = 56


def write_numbered_triple(folder, number, *, hole=(8, 8, 20, 24)):
    mask = Image.new("L", (32, 32))
    mask.paste(255, hole)
    noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for role, picture in (("target", Image.fromarray(noise)), ("mask", mask)):
        (folder / role).mkdir(parents=True, exist_ok=True)
        picture.save(folder / role / f"picture-{number:02d}.png")
    (folder / "target" / f"picture-{number:02d}.txt").write_text(f"noise number {number}")


def contents(cache):
    """Every file of a cache as bytes; shards.npz as its columns, as a zip holds the time of day."""
    files = {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and path.name != "shards.npz"
    }
    table = read_shard_table(cache)
    return files | {"shards.npz": [column.tolist() for column in vars(table).values()]}


def inodes(cache):
    return {path: path.stat().st_ino for path in cache.rglob("*") if path.is_file()}
