"""What a save costs training: how long a step waits for it, how much slower the steps beside it are, and memory.

    python benchmarks/checkpoint.py [--out benchmarks/results/checkpoint.jsonl] [--rounds 4] [--tiny]

The trainer, one process on a CPU, trains all of a FLUX-Fill of 82 M parameters (a checkpoint of 1 GB: weights and two
moments in fp32) and saves every four steps, in turn by:

    async       checkpoint.async, the default: a copy is taken, and written while the next steps run
    sync        checkpoint.async=false: written, flushed to the disk and hashed before the next step
    torch.save  torch.save of the model's and the optimizer's state_dict, then an fsync; no hash, no index, no markers

`stall` is the time between two steps that the save takes, `beside` the sum of what the steps until it is whole take
above the median of the others; memory is the most that became resident from the save's begin until it was whole, above
what was there. Medians of the rounds.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.mid_size import arguments, build_for_training, make_config
from benchmarks.preprocess import write_pictures
from benchmarks.record import add_result
from data.preprocessing.run import preprocess
from demo.tiny_model import build_tiny_model

SHAPE = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 12, "attention_head_dim": 64}
WAYS, EVERY, FIRST, SIDE = ("async", "sync", "torch.save"), 4, 4, 64
SETTINGS = ("method={type: full}", f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=1")


def save_plainly(saver: Any, path: Path) -> None:
    """By torch alone."""
    engine = saver._engine
    with path.open("wb") as file:
        torch.save({"model": engine.unwrap().state_dict(), "optimizer": engine._optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())


class Watch:
    """The saves of one run, each by the way whose turn it is.

    seconds, memory: by way, of its saves.  beside: way -> the steps that ran while one was written.
    """

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.memory: dict[str, list[int]] = defaultdict(list)
        self.beside: dict[str, list[list[int]]] = defaultdict(list)
        self._folder, self._way, self._before = folder, "", 0

    def begin(self, way: str) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here on
        self._way, self._before = way, memory("VmRSS")
        self.beside[way].append([])

    def end(self) -> None:
        self.memory[self._way].append(memory("VmHWM") - self._before)
        self._way = ""

    def save_if_due(self, original: Any, saver: Any, state: Any, *, stopping: bool = False) -> None:
        """In the place of Saver.save_if_due."""
        if self._way:  # the one before is written meanwhile
            self.beside[self._way][-1].append(state.step)
        if state.step % EVERY or state.step <= FIRST:
            saver.commit_if_written()
        else:
            if self._way:  # not whole after so many steps: it ends here, outside of anybody's time
                saver.finish()
                self.end()
            way = WAYS[state.step // EVERY % len(WAYS)]
            self.begin(way)
            start = time.perf_counter()
            if way == "torch.save":
                save_plainly(saver, self._folder / "plain.pt")
            else:
                checkpoint = saver._config.checkpoint.model_copy(update={"asynchronous": way == "async"})
                saver._config = saver._config.model_copy(update={"checkpoint": checkpoint})
                original(saver, state, stopping=stopping)
            self.seconds[way].append(time.perf_counter() - start)
        if self._way and saver._pending is None:
            self.end()


def memory(name: str) -> int:
    """Bytes, as the kernel counts this process's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def measure(folder: Path, *, rounds: int, tiny: bool = False) -> dict[str, Any]:
    """Medians of `rounds` saves by each way."""
    from unittest import mock

    from trainer.checkpoints.save import Saver
    from trainer.main import train

    write_pictures(folder / "pictures", 8)
    if tiny:
        build_tiny_model(folder / "model")
    else:
        build_for_training(folder / "model", {**SHAPE, "axes_dims_rope": [16, 24, 24]})
    preprocess(make_config(folder, *SETTINGS, side=SIDE), Console(quiet=True))
    watch, original = Watch(folder), Saver.save_if_due
    steps = FIRST + EVERY * len(WAYS) * rounds + EVERY - 1

    def save_if_due(saver: Saver, state: Any, *, stopping: bool = False) -> None:
        watch.save_if_due(original, saver, state, stopping=stopping)

    with mock.patch.object(Saver, "save_if_due", save_if_due), contextlib.redirect_stdout(sys.stderr):
        train([*arguments(folder, *SETTINGS, side=SIDE), f"train.steps={steps}", "train.warmup_steps=1"])
    run = next((folder / "runs").iterdir())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines}
    beside = {step for saves in watch.beside.values() for steps in saves for step in steps}
    usual = statistics.median(of for step, of in seconds.items() if step not in beside and step > FIRST)
    size = sum(path.stat().st_size for path in next((run / "checkpoints").glob("step-*")).glob("*.safetensors"))
    return {
        "benchmark": "checkpoint",
        "gib": round(size / 2**30, 3),
        "rounds": rounds,
        "step_seconds": round(usual, 3),
        "stall_seconds": {way: round(statistics.median(watch.seconds[way]), 3) for way in WAYS},
        "beside_seconds": {
            way: round(statistics.median(sum(seconds[step] - usual for step in steps) for steps in saves), 3)
            for way, saves in watch.beside.items()
        },
        "steps_beside": {way: statistics.median(map(len, watch.beside[way])) for way in WAYS},
        "memory_of_checkpoint": {way: round(statistics.median(watch.memory[way]) / size, 3) for way in WAYS},
        "stall_of_torch_save": {
            way: round(statistics.median(watch.seconds[way]) / statistics.median(watch.seconds["torch.save"]), 3)
            for way in WAYS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result to this file, as a JSON line")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="the demo's model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        add_result(measure(Path(folder), rounds=options.rounds, tiny=options.tiny), options.out)


if __name__ == "__main__":
    main()
