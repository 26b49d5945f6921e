"""The same small Fill job by diffusers and accelerate, as an expert would write it in a day (peer_script.py), beside
this trainer: time to the first step, and samples a second.

    python benchmarks/peer.py [--out benchmarks/results/peer.jsonl] [--steps 40] [--repeats 2]

All of the demo's tiny FLUX-Fill trains in fp32 on a CPU, one thread, on the demo's 53 square triples of 64 px, 16 a
step, by AdamW. Each is started by its command, in turn; ours as `fluxfill train` with nothing encoded yet, which
preprocesses first, then with its cache there. Nothing is validated or saved. Seconds are the processor's, of all
processes that a command started, and by the clock; those of a step are medians behind the first five.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.record import add_result
from benchmarks.start import cpu_seconds, end_all, processes_below, program
from demo.photographs import write_triples
from demo.tiny_model import build_tiny_model

ROOT = Path(__file__).resolve().parent.parent
SIDE, BATCH, SKIPPED = 64, 16, 5


def make_inputs(folder: Path) -> None:
    """The tiny model, and the demo's square triples."""
    build_tiny_model(folder / "model")
    write_triples(folder / "all")
    for target in sorted((folder / "all" / "target").glob("*.png")):
        if Image.open(target).size == (SIDE, SIDE):
            for file in (folder / "all").glob(f"*/{target.stem}.*"):
                place = folder / "triples" / file.parent.name
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)


def peer_command(folder: Path, steps: int) -> tuple[list[str], Path]:
    """(the peer's command, the file of its steps)"""
    metrics = folder / "peer.jsonl"
    launch = [program(ROOT, "accelerate"), "launch", "--cpu", "--num_processes", "1"]
    script = [str(ROOT / "benchmarks" / "peer_script.py"), str(folder / "model"), str(folder / "triples")]
    options = ["--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no"]
    return [*launch, *options, *script, str(metrics), str(steps)], metrics


def own_command(folder: Path, steps: int) -> tuple[list[str], Path]:
    """(ours, the file of its steps)"""
    paths = [f"data.datasets.0.{role}={folder}/triples/{role}" for role in ("target", "source", "mask")]
    paths += [f"model.base={folder}/model", f"data.cache={folder}/cache", f"run.dir={folder}/runs"]
    settings = [f"train.steps={steps}", f"train.warmup_steps={min(5, steps - 1)}", f"train.global_batch_size={BATCH}"]
    settings += ["validation.every_steps=null", "checkpoint.every_steps=null", "checkpoint.at_end=false"]
    settings += ["data.holdout=0", "logging.trackers=[]"]
    command = [program(ROOT, "fluxfill"), "train", "configs/demo.yaml", "--resume", "never"]
    return [*command, *paths, *settings], folder / "runs" / "demo" / "metrics.jsonl"


def run(command: list[str], metrics: Path, steps: int) -> dict[str, float]:
    """Seconds of a run, by the processor (cpu_) and by the clock, to the end of its first step and a step after it.
    Raises RuntimeError if it ends before."""
    metrics.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output
        )

        def spent() -> tuple[float, float]:
            return time.monotonic() - start, sum(map(cpu_seconds, processes_below(process.pid)))

        first: tuple[float, float] | None = None
        try:
            while (done := count_lines(metrics)) < steps:
                if done and first is None:
                    first = spent()
                if process.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(f"{command[0]} ended at step {done} of {steps}\n{output.read().decode()}")
                time.sleep(0.02)
            _, whole = last = spent()
        finally:
            end_all(process)
    first = first or last  # where nobody looked in between
    seconds = [json.loads(line)["seconds"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {
        "first_step": first[0],
        "cpu_first_step": first[1],
        "step": statistics.median(seconds[SKIPPED:] or seconds),
        "cpu_step": (whole - first[1]) / (steps - 1),
    }


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def measure(folder: Path, *, steps: int, repeats: int) -> dict[str, Any]:
    """Medians of each way's runs, and ours over the peer's."""
    make_inputs(folder)
    ways = {"ours_cold": own_command, "peer": peer_command, "ours_warm": own_command}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for name, command in ways.items():
            found[name].append(run(*command(folder, steps + 10), steps))  # it is still there when it is looked at
    medians = {
        name: {key: round(statistics.median(one[key] for one in runs), 4) for key in runs[0]}
        for name, runs in found.items()
    }
    ours, peer = medians["ours_warm"], medians["peer"]
    return {
        "benchmark": "peer",
        "steps": steps,
        "repeats": repeats,
        "batch_size": BATCH,
        "seconds": medians,
        "samples_a_cpu_second": {name: round(BATCH / of["cpu_step"], 2) for name, of in medians.items()},
        "times_the_peers_samples_a_second": round(peer["step"] / ours["step"], 3),
        "times_the_peers_samples_a_cpu_second": round(peer["cpu_step"] / ours["cpu_step"], 3),
        "of_the_peers_cpu_to_first_step": {
            name: round(medians[name]["cpu_first_step"] / peer["cpu_first_step"], 3)
            for name in ("ours_cold", "ours_warm")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result to this file, as a JSON line")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        add_result(measure(Path(folder), steps=options.steps, repeats=options.repeats), options.out)


if __name__ == "__main__":
    main()
