"""How fast the scan of a dataset sees that its masks fit, beside the plain way and a scan that decodes masks alone.

    python benchmarks/scan.py [--out benchmarks/results/scan.jsonl] [--triples 2000] [--pictures png] [--before DIR]

Triples of 1024 px from photographs: target and source as JPEG (or PNG), the mask as PNG, from a warm page
cache, on two cores. The plain way is one thread that opens, decodes and compares the three whole pictures by Pillow and
numpy. A migration is `fluxfill migrate --reference`, from the first file to the report. Masks alone are decoded by
`check_masks: off`, or by an earlier checkout. Decoding alone, the ceiling of any scan that looks at all pictures, is
what Pillow takes with a thread for each core: JPEGs at an eighth, PNGs whole, for lack of another way. Each run is a
process of its own, timed behind its imports; they alternate; medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks.record import add_result

ROOT = Path(__file__).resolve().parents[1]
SIZE = 1024
DISTINCT = 40  # triples; the others are links to them


def write_triples(folder: Path, count: int, pictures: str, quality: int) -> dict[str, str]:
    """`count` triples of target, source and mask; returns what a config says of them."""
    from demo.photographs import draw_hole, load_photographs

    photographs = list(load_photographs().values())
    roles = {"target": pictures, "source": pictures, "mask": "png"}
    for role in roles:
        (folder / role).mkdir(parents=True)
    for number in range(count):
        paths = {role: folder / role / f"{number:05d}.{suffix}" for role, suffix in roles.items()}
        if number >= DISTINCT:
            for role, path in paths.items():
                first = folder / role / f"{number % DISTINCT:05d}{path.suffix}"
                if role == "target":
                    path.write_bytes(first.read_bytes()[:-4] + number.to_bytes(4, "big"))
                else:
                    os.link(first, path)
            continue
        generator = np.random.default_rng(number)
        target, other = (cut_square(photographs, generator) for _ in range(2))
        hole = Image.fromarray(draw_hole(generator, 128, 128).astype(np.uint8) * 255).resize((SIZE, SIZE))
        hole = hole.point(lambda level: 255 * (level >= 128))
        for role, picture in (("target", target), ("source", Image.composite(other, target, hole)), ("mask", hole)):
            picture.save(paths[role], quality=quality)  # which PNG passes over
        # Bytes that nobody decodes make each target a picture of its own: a migration leaves duplicates out.
        paths["target"].write_bytes(paths["target"].read_bytes() + number.to_bytes(4, "big"))
    return {"name": "pairs"} | {role: str(folder / role) for role in roles}


def cut_square(photographs: list[Image.Image], generator: np.random.Generator) -> Image.Image:
    """The largest square of a photograph or its mirror image, somewhere in it, enlarged to SIZE."""
    photograph = photographs[generator.integers(len(photographs))]
    side = min(photograph.size)
    left, top = (int(generator.integers(length - side + 1)) for length in photograph.size)
    square = photograph.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return ImageOps.mirror(square) if generator.random() < 0.5 else square


def compare_plainly(dataset: dict[str, str]) -> tuple[float, float, float]:
    """Seconds of one thread that decodes and compares every whole picture, as `scan` gives them."""
    names = sorted(os.listdir(dataset["target"]))
    wrong = 0
    start, cpu_start = time.perf_counter(), time.process_time()
    for name in names:
        target = np.asarray(Image.open(f"{dataset['target']}/{name}").convert("RGB"))
        source = np.asarray(Image.open(f"{dataset['source']}/{name}").convert("RGB"))
        mask = np.asarray(Image.open(f"{dataset['mask']}/{Path(name).stem}.png").convert("L")) >= 128
        difference = np.abs(target.astype(np.int16) - source).max(axis=2)
        wrong += not difference[mask].mean() > difference[~mask].mean()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    if wrong:
        raise RuntimeError(f"{wrong} right triples look wrong")
    return seconds, 0.0, cpu


def decode_alone(dataset: dict[str, str]) -> tuple[float, float, float]:
    """Seconds of threads that decode the three pictures at the size that the scan compares, and do nothing else, as
    `scan` gives them."""
    paths = [path for role in ("target", "source", "mask") for path in Path(dataset[role]).iterdir()]

    def decode(path: Path) -> None:
        with Image.open(path) as picture:
            picture.draft("L", (SIZE // 8, SIZE // 8))  # which PNG passes over
            picture.load()

    start, cpu_start = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(decode, paths):
            pass
    return time.perf_counter() - start, 0.0, time.process_time() - cpu_start


def scan(dataset: dict[str, str], cache: Path) -> tuple[float, float, float]:
    """Seconds of a scan, of the next one of the same files, and of processors in the first."""
    from configs.loading import load_config
    from data.sources.problems import Findings
    from data.sources.scan import scan_dataset

    overrides = [f"data.cache={cache}", f"data.datasets=[{json.dumps(dataset)}]", "data.holdout=0"]
    data = load_config(ROOT / "configs" / "demo.yaml", overrides).data
    seconds = []
    for _ in range(2):
        start, cpu_start = time.perf_counter(), time.process_time()
        found = scan_dataset(data.datasets[0], data, lambda _: None, Findings())
        seconds += [time.perf_counter() - start, time.process_time() - cpu_start]
        if any(getattr(scanned, "fault", None) for scanned in found):
            raise RuntimeError("right triples look wrong")
    return seconds[0], seconds[2], seconds[1]


def migrate_by_reference(dataset: dict[str, str], out: Path) -> tuple[float, float, float]:
    """Seconds of a migration that leaves the pictures where they are, of a second one, and of processors in the
    first."""
    from data.migrate.report import OldFolders
    from data.migrate.run import Options, migrate

    seconds = []
    folders = OldFolders(*(Path(dataset[role]) for role in ("target", "mask", "source")))
    for _ in range(2):
        start, cpu_start = time.perf_counter(), time.process_time()
        report = migrate(folders, out, Options(how="reference"), lambda *_: None)
        seconds += [time.perf_counter() - start, time.process_time() - cpu_start]
        if report.quarantined:
            raise RuntimeError("right triples look wrong")
    return seconds[0], seconds[2], seconds[1]


WITHOUT_CACHE = {"plain": compare_plainly, "decode_alone": decode_alone}


def run_once(kind: str, dataset: dict[str, str], checkout: Path) -> list[float]:
    """Seconds of one run in a process of its own."""
    command = [sys.executable, __file__, "--once", kind, json.dumps(dataset)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the result is appended to, as a JSON line")
    parser.add_argument("--triples", type=int, default=2000)
    parser.add_argument("--pictures", choices=("jpeg", "png"), default="jpeg", help="of targets and sources")
    parser.add_argument("--quality", type=int, default=85, help="of JPEGs")
    parser.add_argument("--before", type=Path, help="an earlier checkout, whose scan is timed too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's folder for such files")
    parser.add_argument("--once", nargs=2, metavar=("KIND", "DATASET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        kind, dataset = options.once[0], json.loads(options.once[1])
        if kind in WITHOUT_CACHE:
            print(json.dumps(WITHOUT_CACHE[kind](dataset)))
            return
        with tempfile.TemporaryDirectory(prefix="scan-", dir=options.folder) as cache:
            measure = migrate_by_reference if kind == "migrate" else scan
            print(json.dumps(measure(dataset, Path(cache))))
        return

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory(prefix="scan-", dir=options.folder) as folder:
        dataset = write_triples(
            Path(folder, "pairs"), options.triples, {"jpeg": "jpg"}.get(options.pictures, "png"), options.quality
        )
        sizes = [path.stat().st_size for path in list(Path(dataset["target"]).iterdir())[:DISTINCT]]
        kinds = {
            "plain": (dataset, ROOT),
            "decode_alone": (dataset, ROOT),
            "scan": (dataset, ROOT),
            "migrate": (dataset, ROOT),
            "masks_alone": (dataset | {"check_masks": "off"}, ROOT),
        }
        if options.before:
            kinds["before"] = (dataset, options.before.resolve())
        seconds: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind, (of_kind, checkout) in kinds.items():
                seconds[kind].append(run_once(kind, of_kind, checkout))
    first = {kind: statistics.median(runs[0] for runs in of_kind) for kind, of_kind in seconds.items()}
    line = {
        "benchmark": "scan",
        "pictures": options.pictures,
        "triples": options.triples,
        "kib_a_picture": round(statistics.mean(sizes) / 1024),
        "triples_a_second": {kind: round(options.triples / median) for kind, median in first.items()},
        "processor_ms_a_triple": {
            kind: round(statistics.median(runs[2] for runs in of_kind) / options.triples * 1e3, 1)
            for kind, of_kind in seconds.items()
        },
        "times_plain": round(first["plain"] / first["scan"], 2),
        "migrate_times_plain": round(first["plain"] / first["migrate"], 2),
        "decode_alone_times_plain": round(first["plain"] / first["decode_alone"], 2),
        "of_masks_alone": round(first["masks_alone"] / first["scan"], 2),
        **({"of_before": round(first["before"] / first["scan"], 2)} if options.before else {}),
        "second_scan_seconds": round(statistics.median(runs[1] for runs in seconds["scan"]), 2),
        "second_migration_seconds": round(statistics.median(runs[1] for runs in seconds["migrate"]), 2),
    }
    add_result(line, options.out)


if __name__ == "__main__":
    main()
