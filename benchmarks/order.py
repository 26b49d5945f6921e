"""The order at scale: memory of a rank and time to its first batch, at the start of an epoch and near its end.

    python benchmarks/order.py [--out benchmarks/results/order.jsonl] [--shards 1000000] [--ranks 4096] [--nodes 512]

A manifest of 1e6 shards with 1e8 samples (three datasets, nine buckets, a few per cent held out) is written by the
cache's own code; then ranks start in processes of their own, read it as a trainer does, and find their rows of the
first batch.
Seconds count from reading shards.npz on; the imports before it (torch) are given apart. Memory is the process's peak.
Nothing is read from shards: they do not exist.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import add_result

ROWS_PER_RANK = 2
BUCKETS = ("1024x1024", "896x1152", "1152x896", "832x1216", "1216x832", "768x1344", "1344x768", "512x512", "640x1536")
WEIGHTS = {"photos": 3.0, "removal": 1.0, "posters": 0.5}


def write_cache_manifest(folder: Path, num_shards: int) -> None:
    """manifest.json and shards.npz of a cache with `num_shards` shards of about 100 samples."""
    import numpy as np

    from data.cache.manifest import FORMAT_VERSION, Manifest, ShardTable, write_manifest
    from data.samples.plan import HOLDOUT, TRAIN

    random = np.random.default_rng(0)
    dataset = np.array(list(WEIGHTS))[random.choice(3, num_shards, p=[0.7, 0.2, 0.1])]
    bucket = np.array(BUCKETS)[random.choice(9, num_shards, p=[0.3, 0.15, 0.15, 0.1, 0.1, 0.08, 0.07, 0.049, 0.001])]
    digests = [random.bytes(32).hex() for _ in range(num_shards)]
    table = ShardTable(
        path=np.array(
            [f"shards/{d}/{b}-{number:06d}.tar" for number, (d, b) in enumerate(zip(dataset, bucket, strict=True))]
        ),
        dataset=dataset,
        bucket=bucket,
        split=np.where(random.random(num_shards) < 0.02, HOLDOUT, TRAIN),
        samples=random.integers(80, 121, num_shards),
        bytes=random.integers(250 << 20, 256 << 20, num_shards),
        sha256=np.array(digests),
        plan=np.array([digest[:32] for digest in digests]),
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        order_version=1,
        settings={},
        encoders={},
        vae_shift=0.1159,
        vae_scale=0.3611,
        text_length=512,
        text_dtype="bf16",
        text_width=4096,
        pooled_width=768,
        mask_variants=dict.fromkeys(WEIGHTS, 1),
        samples={},
        hole_fractions={},
    )
    write_manifest(folder, manifest, table)


def _peak_mib() -> int:
    """Most memory this process has had. Not ru_maxrss: that counts what its parent had when it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))


def start_rank(folder: Path, *, rank: int, ranks: int, streams: int, share: float) -> dict:
    """What a rank does before it reads its first sample, `share` of an epoch on; times and memory of it."""
    import_start = time.perf_counter()
    import numpy as np

    from data.batches.batch_stream import BatchStream  # noqa: F401  a rank has it, and torch with it
    from data.batches.order import Order, OrderSettings, hash_shards, rank_rows
    from data.cache.manifest import read_manifest, read_shard_table
    from data.samples.plan import TRAIN

    start = time.perf_counter()
    before_mib = _peak_mib()
    read_manifest(folder)
    table = read_shard_table(folder)
    read = time.perf_counter()
    samples = np.where(table.split == TRAIN, table.samples, 0)
    size = ranks * ROWS_PER_RANK
    settings = OrderSettings.current(
        seed=0,
        global_batch_size=size,
        weights=WEIGHTS,
        shards=hash_shards(table.path, samples, table.plan),
        streams=streams,
    )
    order = Order(table.dataset, table.bucket, samples, settings)
    made = time.perf_counter()
    first = int(order.num_samples / size * share)
    mine = rank_rows(size, rank=rank, world_size=ranks)
    batch = order.batch(first, mine)
    found = time.perf_counter()
    for index in range(first + 1, first + 101):
        order.batch(index, mine)
    return {
        "rank": rank,
        "share_of_epoch": share,
        "samples": order.num_samples,
        "first_batch": first,
        "rows": len(batch.shards),
        "import_seconds": round(start - import_start, 2),
        "read_head_seconds": round(read - start, 2),
        "order_seconds": round(made - read, 2),
        "first_batch_seconds": round(found - made, 3),
        "seconds_to_first_batch": round(found - start, 2),
        "milliseconds_a_later_batch": round((time.perf_counter() - found) * 10, 3),
        "import_peak_mib": round(before_mib),
        "peak_mib": _peak_mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the results here, a JSON line per rank and place")
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--nodes", type=int, default=512, help="streams of the second half of the runs")
    parser.add_argument("--start-rank", help=argparse.SUPPRESS)  # one rank's arguments, in its own process
    options = parser.parse_args()
    if options.start_rank:
        arguments = json.loads(options.start_rank)
        print(json.dumps(start_rank(Path(arguments.pop("folder")), **arguments)))
        return
    folder = Path(tempfile.mkdtemp(prefix="order-benchmark-"))
    try:
        write_cache_manifest(folder, options.shards)
        for streams in (1, options.nodes):
            for share in (0.0, 0.9):
                rank = options.ranks * 5 // 7
                arguments = {"folder": str(folder), "rank": rank, "ranks": options.ranks, "streams": streams}
                command = [sys.executable, __file__, "--start-rank", json.dumps(arguments | {"share": share})]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                line = {
                    "benchmark": "order",
                    "shards": options.shards,
                    "ranks": options.ranks,
                    "streams": streams,
                    **json.loads(done.stdout),
                    "npz_mib": round((folder / "shards.npz").stat().st_size / 2**20, 1),
                }
                add_result(line, options.out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
