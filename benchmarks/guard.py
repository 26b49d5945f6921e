"""Seconds of a step that pass inside the guard's calls: the limit of a spike, what ranks tell each other, the state.

    python benchmarks/guard.py [--out benchmarks/results/guard.jsonl] [--steps 40]

The trainer itself, on one process and on two of ddp, trains all of a FLUX-Fill of 82 M parameters on the demo's
pictures, with guard.loss_spike on; the calls are timed in rank 0. `told`, the one message between ranks (loss, stop,
gradient), holds the time that rank 0 waits there for the device and for the other. Steps before a loss has a limit are
left out. Medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import add_result

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"single": 1, "ddp": 2}
FIRST = 22  # steps that are left out: without a limit, and with cold caches
SHAPE = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 12, "attention_head_dim": 64}


def make_inputs(folder: Path) -> list[str]:
    """The demo's triples, a model of SHAPE and a cache below `folder`; the settings that name them."""
    from diffusers import FluxTransformer2DModel
    from rich.console import Console

    from configs.loading import load_config
    from data.preprocessing.run import preprocess
    from demo.photographs import write_triples
    from demo.tiny_model import build_tiny_model

    write_triples(folder / "triples")
    build_tiny_model(folder / "model")
    tiny = FluxTransformer2DModel.load_config(folder / "model", subfolder="transformer")
    model = FluxTransformer2DModel.from_config({**tiny, **SHAPE, "axes_dims_rope": [16, 24, 24]})
    model.save_pretrained(folder / "model" / "transformer")
    settings = [f"data.datasets.0.{role}={folder}/triples/{role}" for role in ("target", "source", "mask")]
    settings += [f"model.base={folder}/model", f"data.cache={folder}/cache", f"run.dir={folder}/runs"]
    settings += ["validation.every_steps=null", "checkpoint.every_steps=null", "checkpoint.at_end=false"]
    settings += ["logging.trackers=[]", "guard.loss_spike=1e3", "train.warmup_steps=5"]
    preprocess(load_config(ROOT / "configs" / "demo.yaml", settings), Console(quiet=True))
    return settings


def train_timed(arguments: list[str], out: Path) -> None:
    """The trainer, in a rank: rank 0 writes {call: seconds of each step} to `out`."""
    from trainer import main
    from trainer.checkpoints.run_state import RunState
    from trainer.engines.base import Engine

    seconds: dict[str, list[float]] = {"loss_limit": [], "told": [], "state": [], "step": []}

    def timed(name: str, function: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                seconds[name].append(time.perf_counter() - start)

        return call

    main.loss_limit = timed("loss_limit", main.loss_limit)
    RunState.after = timed("state", RunState.after)
    Engine._tell_all = timed("told", Engine._tell_all)
    main.train(arguments)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(seconds), encoding="utf-8")


def measure(folder: Path, settings: list[str], engine: str, steps: int) -> dict:
    """Medians of a run, in seconds."""
    out, name = folder / f"{engine}.json", f"guard-{engine}"
    launch = ["accelerate.commands.launch", "--config_file", f"configs/engines/{engine}.yaml"]
    launch += ["--num_processes", str(ENGINES[engine]), "--main_process_port", "0", __file__, "--rank", str(out)]
    given = ["--config", "configs/demo.yaml", *settings, f"run.name={name}", f"train.steps={steps}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *launch, *given], cwd=ROOT, env=environment, check=True)
    seconds = json.loads(out.read_text(encoding="utf-8"))
    metrics = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds["step"] = [json.loads(line)["seconds"] for line in metrics]
    return {call: statistics.median(of[FIRST:]) for call, of in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the results to this file, a JSON line each")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = make_inputs(folder)
        for engine, processes in ENGINES.items():
            medians = measure(folder, settings, engine, options.steps)
            step = medians.pop("step")
            share = sum(medians.values()) / step
            line = {"benchmark": "guard", "engine": engine, "processes": processes, "step_seconds": round(step, 4)}
            line |= {f"{call}_microseconds": round(1e6 * of, 1) for call, of in medians.items()}
            add_result(line | {"percent_of_step": round(100 * share, 4)}, options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        train_timed(sys.argv[3:], Path(sys.argv[2]))
    else:
        main()
