"""What the trainer adds to a step: it beside a bare PyTorch loop on the same tensors; and where a step's time goes.

    python benchmarks/overhead.py [--out benchmarks/results/overhead.jsonl] [--steps 12] [--tiny]

On a CPU, one thread each, a LoRA on a model with all of FLUX.1's layers and an eighth of their widths, one picture of
256 px a step. Two processes make a step in turn:

    bare     the model, AdamW and sixteen micro-batches in memory: noise, forward pass, loss, backward pass, clipping,
             update; nothing else
    trainer  trainer/main.py: the same, and reading shards, drawing noise, the checks of every update, logs

Seconds are the processor's, of all threads; the ratio is a median over the turns. Phases are those of the trainer's
steps, by the clock, medians; `rest` is what lies between them.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.mid_size import SIDE, arguments, make_config, make_inputs
from benchmarks.record import add_result
from benchmarks.turns import Turns, alternate, ratio, train_in_turns
from data.batches.micro_batch import MicroBatch
from data.preprocessing.run import preprocess
from trainer.adapters.build import add_adapter
from trainer.model.flow import flow_loss, mix_noise, region_weight, sample_sigma
from trainer.model.flux import load_transformer, pack_latents, predict_velocity

_MOST_BATCHES = 16


def train_bare(folder: Path, side: int, turns: Turns) -> None:
    """The loop that has nothing but the arithmetic."""
    config = make_config(folder, side=side)
    batches = read_batches(folder, side)
    transformer = load_transformer(folder / "model", dtype=torch.float32)
    assert config.method.type == "lora"
    add_adapter(transformer, config.method, expanded=False, seed=config.run.seed)
    transformer.train()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=config.train.weight_decay, fused=True)
    while True:
        for rows in batches:
            sigma = sample_sigma(rows.uniform, rows.bucket.tokens, config.flow)
            velocity = predict_velocity(
                transformer, mix_noise(rows.latents, rows.noise, sigma), rows, sigma, config.flow
            )
            region = region_weight(rows.hole, config.flow)
            flow_loss(velocity, pack_latents(rows.noise - rows.latents.float()), region).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            turns.end_step()


def read_batches(folder: Path, side: int) -> list[MicroBatch]:
    """The micro-batches that the trainer's first steps have."""
    from trainer.checkpoints.run_state import RunState
    from trainer.engines.start import start_engine
    from trainer.training_data import choose_order, open_samples, open_stream

    config = make_config(folder, side=side)
    engine = start_engine(config)
    samples = open_samples(config, folder / "model", engine, Console(quiet=True))
    state = RunState(step=0, batch=0, skips=0, restarts=0, order=choose_order(config, samples))
    with open_stream(config, engine, samples, state, 1) as stream:
        return [copy_of(rows) for _, batch in zip(range(_MOST_BATCHES), stream, strict=False) for rows in batch]


def copy_of(rows: MicroBatch) -> MicroBatch:
    """In memory of its own: the stream uses its buffers again."""
    tensors: Any = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in vars(rows).items()}
    return MicroBatch(**tensors)


def train_ours(folder: Path, side: int, phases_out: Path, turns: Turns) -> None:
    """The trainer, its phases written to a file at the end of each step."""
    seconds: dict[str, list[float]] = defaultdict(list)
    time_phases(seconds)
    turns.end_step = write_before(turns.end_step, seconds, phases_out)
    train_in_turns(arguments(folder, side=side), turns)


def write_before(end_step: Callable, seconds: dict[str, list[float]], out: Path) -> Callable:
    def call(*given: Any) -> None:
        import json

        out.write_text(json.dumps(seconds), encoding="utf-8")
        end_step(*given)

    return call


def time_phases(seconds: dict[str, list[float]]) -> None:
    """Have the loop's callees note how long each call of them took."""
    from trainer import main
    from trainer.checkpoints.save import Saver
    from trainer.engines.base import Engine
    from trainer.run_log import RunLog

    def timed(phase: str, function: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                seconds[phase].append(time.perf_counter() - start)

        return call

    micro_steps = Engine.micro_steps

    def timed_micro_steps(self: Engine, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        rows = micro_steps(self, micro_batches)
        start = time.perf_counter()
        for batch in rows:
            seconds["data"].append(time.perf_counter() - start)
            yield batch

    Engine.micro_steps = timed_micro_steps
    main.predict_velocity = timed("forward pass", main.predict_velocity)
    main.flow_loss = timed("loss", main.flow_loss)
    Engine.backward = timed("backward pass", Engine.backward)
    Engine.step = timed("clipping and update", Engine.step)
    RunLog.step = timed("logs", RunLog.step)
    Saver.save_if_due = timed("saves", Saver.save_if_due)


def measure(folder: Path, *, tiny: bool, steps: int) -> dict[str, Any]:
    """The ratio of `steps` alternating steps, and the shares of the trainer's phases."""
    import json

    side = 64 if tiny else SIDE
    make_inputs(folder, tiny=tiny)
    preprocess(make_config(folder, side=side), Console(quiet=True))
    phases = folder / "phases.json"
    made = alternate(
        {"bare": partial(train_bare, folder, side), "trainer": partial(train_ours, folder, side, phases)}, steps=steps
    )
    bare, trainer = made["bare"], made["trainer"]
    medians = {
        phase: statistics.median(values[1:] or values) for phase, values in json.loads(phases.read_text()).items()
    }
    whole = statistics.median(trainer.wall)
    return {
        "benchmark": "overhead",
        "model": "tiny" if tiny else "middling",
        "side": side,
        "steps": steps,
        "ratio": round(ratio(trainer.cpu, bare.cpu), 4),
        "ratio_of_wall": round(ratio(trainer.wall, bare.wall), 4),
        "step_cpu_seconds": round(statistics.median(trainer.cpu), 3),
        "bare_cpu_seconds": round(statistics.median(bare.cpu), 3),
        "percent_of_step": {phase: round(100 * of / whole, 2) for phase, of in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result to this file, as a JSON line")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="the demo's model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        add_result(measure(Path(folder), tiny=options.tiny, steps=options.steps), options.out)


if __name__ == "__main__":
    main()
