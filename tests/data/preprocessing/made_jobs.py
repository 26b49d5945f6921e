"""Triples and jobs for the tests of preprocessing."""

import shutil

import numpy as np
from PIL import Image
from rich.console import Console

QUIET = Console(quiet=True)


def write_triple(folder, name, *, seed=0, size=(32, 32), hole=(8, 8, 20, 24)):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    mask = Image.new("L", size)
    if hole:
        mask.paste(255, hole)
    for role, picture in (("target", Image.fromarray(target)), ("mask", mask)):
        (folder / role).mkdir(parents=True, exist_ok=True)
        picture.save(folder / role / f"{name}.png")
    (folder / "target" / f"{name}.txt").write_text(f"noise number {seed}")


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def stamps(folder, suffix=""):
    """What tells a file that was written anew: its inode and time."""
    return {
        name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for name, path in files_below(folder).items()
        if name.endswith(suffix)
    }


def shard_bytes(cache):
    return {name: path.read_bytes() for name, path in files_below(cache / "shards").items()}


def leftovers(cache):
    return [name for name in files_below(cache) if ".part" in name]


def cut(path):
    """Keep a picture's header and lose its end: nothing tells before it is decoded."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return data


BAD_PICTURES = {
    "missing mask": (
        lambda folder: (folder / "mask" / "picture-01.png").unlink(),
        r"target/picture-01\.png: no mask of the same name in \S+/mask\. Add it, or remove the target\.",
    ),
    "missing target": (
        lambda folder: (folder / "target" / "picture-01.png").unlink(),
        r"mask/picture-01\.png: no target of the same name in \S+/target\. Add it, or remove this mask\.",
    ),
    "empty folder": (
        lambda folder: [path.unlink() for path in (folder / "mask").iterdir()],
        r"dataset noise: mask folder \S+/mask holds no picture \(.*\.bmp.*\)\. Check data\.datasets\.\*\.mask\.",
    ),
    "missing folder": (
        lambda folder: shutil.rmtree(folder / "mask"),
        r"dataset noise: mask folder \S+/mask does not exist\.",
    ),
    "mask of another size": (
        lambda folder: Image.new("L", (32, 40)).save(folder / "mask" / "picture-01.png"),
        r"mask/picture-01\.png: the mask is 32x40, its target \S+target/picture-01\.png is 32x32\. Make the mask at",
    ),
    "black mask": (
        lambda folder: write_triple(folder, "picture-01", hole=None),
        r"mask/picture-01\.png: the mask is all black \(its brightest pixel is 0 of 255\): nothing to paint\. .*is it",
    ),
    "mask of 0 and 1": (
        lambda folder: Image.new("L", (32, 32), 1).save(folder / "mask" / "picture-01.png"),
        r"mask/picture-01\.png: the mask is all black \(its brightest pixel is 1 of 255\)",
    ),
    "white mask": (
        lambda folder: write_triple(folder, "picture-01", hole=(0, 0, 32, 32)),
        r"mask/picture-01\.png: the mask is all white \(its darkest pixel is 255 of 255\): nothing to keep\. .*is",
    ),
    "unreadable target": (
        lambda folder: (folder / "target" / "picture-01.png").write_text("<!DOCTYPE html>"),
        r"target/picture-01\.png: not a readable picture \(.*\)\. Replace or remove the file, or convert it",
    ),
    "unreadable mask": (
        lambda folder: cut(folder / "mask" / "picture-01.png"),
        r"mask/picture-01\.png: (cannot be decoded|not a readable picture) \(.*\)\. Replace or remove the file\.",
    ),
}
