"""Pictures in folders and tars for the tests of scanning."""

import io
import tarfile

import numpy as np
from PIL import Image

from data.sources.problems import Findings
from data.sources.scan import scan_dataset

NAMES = [f"{letter}/{number:02d}" for letter in "ab" for number in range(10)]


def picture_bytes(seed, size=(24, 16), *, mask=False):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    pixels = np.where(pixels > 127, 250, 5).astype(np.uint8) if mask else np.stack([pixels] * 3, -1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folders(folder, names=NAMES):
    for number, name in enumerate(names):
        for role in ("target", "mask"):
            path = folder / role / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture_bytes(number, mask=role == "mask"))
        (folder / "target" / f"{name}.txt").write_text(f"caption {number}")


def write_tar(path, pictures):
    """pictures: member name -> bytes."""
    with tarfile.open(path, "w") as archive:
        for name, data in pictures.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def scanned_by(data, advance=lambda count: None, **options):
    findings = Findings()
    scanned = scan_dataset(data.datasets[0], data, advance, findings, **options)
    findings.raise_problems()
    return scanned


def facts_by_name(scanned):
    return {entry.item.name: (entry.item.caption, entry.target[:5], entry.mask and entry.mask[:5]) for entry in scanned}


def members_of(tmp_path, letter):
    members = {}
    for number in range(10):
        name = f"{letter}/{number:02d}"
        members[f"{number:02d}.png"] = (tmp_path / "target" / f"{name}.png").read_bytes()
        members[f"{number:02d}.mask.png"] = (tmp_path / "mask" / f"{name}.png").read_bytes()
        members[f"{number:02d}.txt"] = (tmp_path / "target" / f"{name}.txt").read_bytes()
    return members


def read_all(scanned):
    """As encoding does, checked against the facts."""
    for entry in scanned:
        for file, facts in ((entry.item.target, entry.target), (entry.item.mask, entry.mask)):
            assert file.read(1 << 20).content == facts.content
