"""What encoding while training costs: a batch's time with data.mode online, beside encoding and training in turn.

    python benchmarks/online.py [--out benchmarks/results/online.jsonl] [--batches 12] [--repeats 5]

On a CPU, with the pictures and the random encoders of benchmarks/preprocess.py; every picture has a caption of its own.
A training step is stood in for by a wait as long as a batch takes to encode: as on a GPU, it leaves the CPU alone. Four
ways over the same batches, with encoders that are loaded already, runs alternating:

    bare      one batch after the other: decode, encode pictures and captions; nothing is kept, nobody trains
    encode    the stream of data.mode online, read as fast as it comes: what encoding can keep up with
    in turn   a batch of bare, then a training step
    online    the stream of data.mode online, and a training step with each batch of it
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from benchmarks.preprocess import build_model, make_config, plan, write_pictures
from data.batches.batch_stream import BatchStream
from data.batches.order import Order, OrderSettings
from data.batches.row_filler import RowPolicy
from data.encoders.encode import collate_pixels, encode_captions, encode_pixels
from data.encoders.load import Encoders
from data.online.training_set import OnlineTrainingSet
from data.preprocessing.worker import Worker
from data.samples.decode import load_pixels
from data.samples.plan import PlannedSample


def encode_batch(samples: list[PlannedSample], encoders: Encoders, config) -> None:
    """Decode and encode in this thread, and let the tensors go."""
    pixels = collate_pixels([load_pixels(sample, config.data) for sample in samples])
    encode_pixels(encoders.vae, pixels)
    captions = [sample.triple.caption for sample in samples]
    encode_captions(encoders.text, captions, text_length=config.data.captions.text_length)


def measure(folder: Path, *, batches: int, batch_size: int, repeats: int, threads: int) -> dict:
    """Seconds per batch of the four ways, each the median of `repeats` alternating runs after one that warms up."""
    torch.set_num_threads(threads)
    write_pictures(folder / "pictures", batches * batch_size)
    build_model(folder / "model")
    config = make_config(folder, batch_size)
    plans = plan(config)
    samples = OnlineTrainingSet(
        config, folder / "model", plans, device=torch.device("cpu"), worker=Worker(decode_threads=2)
    )
    table = samples.table
    # One epoch is as many batches; the stream goes on behind its end, with the same pictures.
    settings = OrderSettings.current(
        seed=0, global_batch_size=batch_size, weights={"photos": 1.0}, shards="", block_shards=len(plans)
    )
    order = Order(table.dataset, table.bucket, table.samples, settings)
    epoch = [
        [plans[s].samples[r] for s, r in zip(b.shards, b.rows, strict=True)] for b in map(order.batch, range(batches))
    ]
    encoders = samples._encoders

    def stream(step_seconds: float) -> float:
        rows = samples.open_rows(order, RowPolicy(), ())
        opened = BatchStream(samples.manifest, order, rows, rank=0, world_size=1, micro_batch_size=batch_size)
        samples._encoder._texts._kept.clear()  # of the run before
        for _ in next(opened):  # before it, nothing could be ahead
            time.sleep(step_seconds)
        start = time.perf_counter()
        for micro_batches in islice(opened, batches):
            for _ in micro_batches:
                time.sleep(step_seconds)
        spent = time.perf_counter() - start
        opened.close()
        return spent / batches

    def in_turn(step_seconds: float) -> float:
        start = time.perf_counter()
        for batch in epoch:
            encode_batch(batch, encoders, config)
            time.sleep(step_seconds)
        return (time.perf_counter() - start) / batches

    in_turn(0.0)
    step_seconds = in_turn(0.0)
    ways = {
        "bare": (in_turn, 0.0),
        "encode": (stream, 0.0),
        "in_turn": (in_turn, step_seconds),
        "online": (stream, step_seconds),
    }
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, (run, step) in ways.items():
            spent = run(step)
            if repeat:
                runs[name].append(spent)
    medians = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "benchmark": "online",
        "pictures": batches * batch_size,
        "side": 256,
        "batch_size": batch_size,
        "repeats": repeats,
        "step_seconds": round(step_seconds, 4),
        **{f"{name}_seconds_per_batch": round(value, 4) for name, value in medians.items()},
        "encode_share_of_bare": round(medians["bare"] / medians["encode"], 3),
        "online_times_in_turn": round(medians["in_turn"] / medians["online"], 3),
        "runs": {name: [float(f"{value:.4g}") for value in values] for name, values in runs.items()},
        "cores": os.cpu_count(),
        "torch_threads": threads,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "diffusers", "transformers", "pillow")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result here, as a JSON line")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; all cores by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="online-benchmark-"))
    try:
        result = measure(
            folder,
            batches=options.batches,
            batch_size=options.batch_size,
            repeats=options.repeats,
            threads=options.threads,
        )
    finally:
        shutil.rmtree(folder)
    line = json.dumps(result)
    print(line, flush=True)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
