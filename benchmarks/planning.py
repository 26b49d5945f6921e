"""Planning at scale: seconds and memory to plan N triples, the first time and again.

    python benchmarks/planning.py [--out benchmarks/results/planning.jsonl] [--triples 1000000] [--folder TMP]
    python benchmarks/planning.py --sources scan_cache [--scanned 1000000]

Folders hold N targets and N masks, tars 1,000 samples each. The picture is one of 64 px, linked or copied under every
name: disks and decoding are left out, what is measured is what planning itself takes for each triple. The first run
reads, hashes and checks all pictures; the second takes over what it found and looks at times and sizes alone. Under
scan_cache what a scan found out about --scanned triples in tars is made up, and planned: of the pictures none is there.
Each run is a process of its own; memory is its peak above what it had after its imports.
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks.record import add_result

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


def write_scan_cache(folder: Path, count: int) -> dict:
    """What a scan leaves of tars of pictures in all sizes from 512 to 1535 px, with captions of their own; the tars
    are empty."""
    from PIL import Image

    from data.sources.items import Item
    from data.sources.mask_reach import measure_reach
    from data.sources.picture_file import PictureFile
    from data.sources.problems import Findings
    from data.sources.scan import _Scanner, stamp_of
    from data.sources.scan_cache import PictureInfo, ScannedItem, row_of_infos, row_of_item

    folder.mkdir(parents=True)
    tars = -(-count // PER_TAR)
    dataset = {"name": "photos", "tars": f"{folder}/{{00000..{tars - 1:05d}}}.tar"}
    config = load_demo(folder, dataset)
    hole = Image.new("L", (512, 512))
    hole.paste(255, (64, 64, 320, 400))
    reach = measure_reach(hole)  # nothing has to be decoded, as of most masks
    scanner = _Scanner(config.data.datasets[0], config.data, Findings(), thorough=False)
    for number in range(tars):
        tar = folder / f"{number:05d}.tar"
        tar.touch()
        rows: list[list] = [[]]
        for triple in range(number * PER_TAR, min(count, (number + 1) * PER_TAR)):
            target, mask = (PictureFile(str(tar), 2048 * triple + at, 1000, f"{triple}.png") for at in (0, 1024))
            item = Item(f"picture-{triple:08d}", target, mask, None, f"caption {triple}")
            sizes = 512 + triple % 1024, 512 + triple // 7 % 1024
            contents = [f"{2 * triple + number:032x}" for number in (0, 1)]
            infos = PictureInfo(contents[0], *sizes), PictureInfo(contents[1], *sizes, 0, 255, reach=reach)
            rows.append([*row_of_item(item, str(tar)), *row_of_infos(ScannedItem(item, *infos, None))])
        key = scanner._key("tar", str(tar), stamp_of(str(tar)), scanner.dataset.members.model_dump())
        scanner.results.write(key, rows)
    return dataset


def load_demo(folder: Path, dataset: dict):
    """The demo's config over a dataset."""
    from configs.loading import load_config

    overrides = [f"data.cache={folder}/cache", f"data.datasets=[{json.dumps(dataset)}]", "data.holdout=0"]
    return load_config(ROOT / "configs" / "demo.yaml", overrides)


def plan_once(folder: Path, dataset: dict) -> dict[str, float]:
    """Plan a dataset as preprocessing does, in this process."""
    from rich.console import Console

    from data.cache.manifest import FORMAT_VERSION
    from data.preprocessing.progress import open_progress
    from data.preprocessing.worker import Worker
    from data.samples.plan import plan_samples
    from data.samples.shard_plan import plan_shards

    config = load_demo(folder, dataset)
    before = peak_mib()
    start, cpu_start = time.perf_counter(), time.process_time()
    with open_progress(Console(quiet=True), Worker()) as progress:
        samples = plan_samples(config, progress)
    read_seconds = time.perf_counter() - start
    plans = plan_shards(samples, size_limit=256 << 20, text_bytes=4 << 20, encoding={}, format_version=FORMAT_VERSION)
    seconds = time.perf_counter() - start
    return {
        "triples": len(samples),
        "shards": len(plans),
        "scan_seconds": round(read_seconds, 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "mib": round(peak_mib() - before),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


SOURCES = {
    "folders": (write_folders, ("first", "again")),
    "tars": (write_tars, ("first", "again")),
    "scan_cache": (write_scan_cache, ("from a scan cache",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the results are appended to, as JSON lines")
    parser.add_argument("--triples", type=int, default=1_000_000)
    parser.add_argument("--scanned", type=int, default=1_000_000, help="triples of scan_cache")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's folder for such files")
    parser.add_argument("--plan", nargs=2, metavar=("FOLDER", "DATASET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan_once(Path(options.plan[0]), json.loads(options.plan[1]))))
        return
    folder = Path(tempfile.mkdtemp(prefix="planning-", dir=options.folder))
    try:
        for kind in options.sources:
            write, runs = SOURCES[kind]
            dataset = write(folder / kind, options.scanned if kind == "scan_cache" else options.triples)
            for run in runs:
                command = [sys.executable, __file__, "--plan", str(folder / kind), json.dumps(dataset)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                add_result({"benchmark": "planning", "source": kind, "run": run, **found}, options.out)
            shutil.rmtree(folder / kind)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
