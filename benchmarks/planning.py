"""Planning at scale: seconds and memory to plan N triples, the first time and again.

    python benchmarks/planning.py [--out benchmarks/results/planning.jsonl] [--triples 1000000] [--folder TMP]

Folders hold N targets and N masks, tars 1,000 samples each. The picture is one of 64 px, linked or copied under every
name: disks and decoding are left out, what is measured is what planning itself takes for each triple. The first run
reads, hashes and checks all pictures; the second takes over what it found and looks at times and sizes alone. Each run
is a process of its own; memory is its peak above what it had after its imports.
"""

import argparse
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PER_FOLDER = PER_TAR = 1000


def picture_bytes(*, mask: bool) -> bytes:
    from PIL import Image

    picture = Image.new("L" if mask else "RGB", (64, 64))
    picture.paste(255 if mask else (200, 100, 50), (8, 8, 40, 50))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_folders(folder: Path, count: int) -> dict:
    """Hard links to one target and one mask."""
    for role in ("target", "mask"):
        (folder / role).mkdir(parents=True)
        # A file may have 65,000 names on ext4, so each subfolder has a file of its own.
        for first in range(0, count, PER_FOLDER):
            below = folder / role / f"{first // PER_FOLDER:05d}"
            below.mkdir()
            original = below / f"picture-{first:08d}.png"
            original.write_bytes(picture_bytes(mask=role == "mask"))
            for number in range(first + 1, min(first + PER_FOLDER, count)):
                os.link(original, below / f"picture-{number:08d}.png")
    return {"name": "photos", "target": str(folder / "target"), "mask": str(folder / "mask")}


def write_tars(folder: Path, count: int) -> dict:
    """Tars of target, mask and caption."""
    folder.mkdir(parents=True)
    tars = -(-count // PER_TAR)
    members = {"png": picture_bytes(mask=False), "mask.png": picture_bytes(mask=True), "txt": b"a caption"}
    for tar in range(tars):
        with tarfile.open(folder / f"{tar:05d}.tar", "w") as archive:
            for number in range(tar * PER_TAR, min(count, (tar + 1) * PER_TAR)):
                for suffix, data in members.items():
                    entry = tarfile.TarInfo(f"picture-{number:08d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return {"name": "photos", "tars": f"{folder}/{{00000..{tars - 1:05d}}}.tar"}


def plan_once(folder: Path, dataset: dict) -> dict[str, float]:
    """Plan a dataset as preprocessing does, in this process."""
    from rich.console import Console

    from configs.loading import load_config
    from data.preprocessing.progress import open_progress
    from data.preprocessing.worker import Worker
    from data.samples.plan import plan_samples
    from data.samples.shard_plan import plan_shards

    overrides = [f"data.cache={folder}/cache", f"data.datasets=[{json.dumps(dataset)}]", "data.holdout=0"]
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    before = peak_mib()
    start = time.perf_counter()
    with open_progress(Console(quiet=True), Worker()) as progress:
        samples = plan_samples(config, progress)
    read_seconds = time.perf_counter() - start
    plans = plan_shards(samples, size_limit=256 << 20, text_bytes=4 << 20, encoding={}, format_version=1)
    seconds = time.perf_counter() - start
    return {
        "triples": len(samples),
        "shards": len(plans),
        "scan_seconds": round(read_seconds, 1),
        "seconds": round(seconds, 1),
        "mib": round(peak_mib() - before),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the results are appended to, as JSON lines")
    parser.add_argument("--triples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's folder for such files")
    parser.add_argument("--plan", nargs=2, metavar=("FOLDER", "DATASET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan_once(Path(options.plan[0]), json.loads(options.plan[1]))))
        return
    folder = Path(tempfile.mkdtemp(prefix="planning-", dir=options.folder))
    try:
        for kind, write in (("folders", write_folders), ("tars", write_tars)):
            dataset = write(folder / kind, options.triples)
            for run in ("first", "again"):
                command = [sys.executable, __file__, "--plan", str(folder / kind), json.dumps(dataset)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                line = {
                    "benchmark": "planning",
                    "source": kind,
                    "run": run,
                    **found,
                    "python": platform.python_version(),
                }
                print(json.dumps(line), flush=True)
                if options.out is not None:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
            shutil.rmtree(folder / kind)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
