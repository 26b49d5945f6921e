"""Two ranks beside one under each engine: time of a step, and the bytes that ranks exchange in one.

    python benchmarks/scaling.py [--out benchmarks/results/scaling.jsonl] [--steps 6] [--repeats 3] [--engines ddp ...]

On a CPU, one thread a rank, gloo; all of a FLUX-Fill of 21 M parameters trains in bf16, one picture of 64 px a rank, so
that two ranks have twice the work. Seconds are those of rank 0, by the processor and by the clock, over those of one
rank (under ddp, of `single`), which runs before each run of two; of the repeats, the median of these shares. On a
machine with other work the clock tells little.

Bytes are counted at the collectives of one step, by their tensors, as a ring moves them: of what n ranks hold each gets
(n - 1) / n, in an all-reduce twice. `by_plan` is what `fluxfill plan` reckons with (configs/communication.py). What
DeepSpeed does by the size of a model, it is made to do as with FLUX.1 (`treat_as_large`).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ranks import own_port, rank_environments, take_environment, warm_context
from benchmarks.record import add_result

SHAPE = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64}
SHAPE_MORE = {"axes_dims_rope": [16, 24, 24]}
SIDE, WARM = 64, 2
LAUNCHES = {"ddp": ("single", "ddp")} | {engine: (engine, engine) for engine in ("fsdp2", "zero1", "zero2", "zero3")}
# Elements that DeepSpeed reduces at once, and of weights that it has gathered at once: else 2e8 and 1e9.
DEEPSPEED_LIMIT = 1_000_000
# Collectives of torch.distributed by the dispatcher's names -> of which argument the bytes are, and how often a ring
# moves them.
_COLLECTIVES = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "_allgather_base_": (0, 1),
    "allgather_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "broadcast_": (0, 1),
    "reduce_": (0, 1),
    "alltoall_base_": (1, 1),
}


def settings(folder: Path, processes: int, steps: int, micro_steps: int = 1, *overrides: str) -> list[str]:
    from benchmarks.mid_size import arguments

    more = ["method={type: full}", "model.precision=bf16", f"train.global_batch_size={processes * micro_steps}"]
    more += [f"train.steps={steps}", "train.warmup_steps=1", "parallel.engine=auto", "data.captions.text_length=16"]
    return arguments(folder, *more, *overrides, side=SIDE)


class Collectives(TorchDispatchMode):
    """Counts the bytes of the collectives inside it, by their name: `moved`, of n ranks times n / (n - 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func.overloadpacket.__name__) in _COLLECTIVES:
            which, times = _COLLECTIVES[name]
            given = [tensor for tensor in tree_leaves(args[which]) if isinstance(tensor, Tensor)]
            self.moved[name] += times * sum(tensor.numel() * tensor.element_size() for tensor in given)
        return func(*args, **(kwargs or {}))


def treat_as_large() -> None:
    """From now on ZeRO partitions every parameter, releases what it gathered, and reduces in many buckets, as with
    FLUX.1: of 21 M parameters all would fit a single bucket, and stay gathered until the backward pass."""
    from configs import communication
    from trainer.engines import zero

    zero.ZERO_BUCKET = zero.ZERO3_LIVE = communication.ZERO_BUCKET = DEEPSPEED_LIMIT
    prepare = zero.ZeroEngine._prepare

    def prepare_as_large(self: Any, *given: Any, **named: Any) -> Any:
        limits = self._accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        limits["stage3_param_persistence_threshold"] = 0
        limits["stage3_prefetch_bucket_size"] = DEEPSPEED_LIMIT // 20  # as 5e7 is to 1e9
        return prepare(self, *given, **named)

    zero.ZeroEngine._prepare = prepare_as_large


def train_counted(arguments: list[str], steps: int) -> dict[str, Any]:
    """The trainer, in a rank: seconds of its steps, and the bytes of its last one's collectives."""
    from trainer.main import train
    from trainer.run_log import RunLog

    wall, cpu, mode = [time.perf_counter()], [time.process_time()], Collectives()
    log_step = RunLog.step

    def log_and_count(self: RunLog, state: Any, *rest: Any, **named: Any) -> None:
        if state.step == steps:
            mode.__exit__(None, None, None)
        log_step(self, state, *rest, **named)
        wall.append(time.perf_counter())
        cpu.append(time.process_time())
        if state.step == steps - 1:
            mode.__enter__()

    RunLog.step = log_and_count
    train(arguments)
    spent = {
        "wall": [later - earlier for earlier, later in pairwise(wall)],
        "cpu": [later - earlier for earlier, later in pairwise(cpu)],
    }
    # The first ones allocate; the last one is watched.
    return {key: statistics.median(values[WARM:-1]) for key, values in spent.items()} | {"moved": dict(mode.moved)}


def _rank_main(environment: dict[str, str], arguments: list[str], steps: int, results: Any) -> None:
    take_environment(environment)
    os.dup2(2, 1)  # results alone stand on standard output
    import torch

    torch.set_num_threads(1)
    treat_as_large()
    results.send(train_counted(arguments, steps))


def launch(engine: str, processes: int, arguments: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """What each rank of a launch found. Raises EOFError if one dies."""
    with own_port() as port:
        return _launch(port, engine, processes, arguments, steps)


def _launch(port: int, engine: str, processes: int, arguments: Sequence[str], steps: int) -> list[dict[str, Any]]:
    context = warm_context()
    started = []
    for environment in rank_environments(engine, processes, port):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(environment, arguments, steps, sender), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        return [receiver.recv() for _, receiver in started]
    finally:
        for process, _ in started:
            process.join(timeout=20)
            process.kill()


def bytes_received(rank: dict[str, Any]) -> dict[str, float]:
    """What one of two ranks got in a step, by collective."""
    return {name: size / 2 for name, size in rank["moved"].items()}  # (n - 1) / n of it


def make_inputs(folder: Path) -> int:
    """Pictures, a model and a cache below `folder`; returns the model's parameters."""
    from rich.console import Console

    from benchmarks.mid_size import build_for_training, make_config
    from benchmarks.preprocess import write_pictures
    from configs.flux_shape import FluxShape
    from data.encoders.model_folder import read_part_config
    from data.preprocessing.run import preprocess

    write_pictures(folder / "pictures", 8)
    build_for_training(folder / "model", SHAPE | SHAPE_MORE)
    preprocess(make_config(folder, "data.captions.text_length=16", side=SIDE), Console(quiet=True))
    return FluxShape.of(read_part_config(folder / "model", "transformer")).parameters


def bytes_by_plan(folder: Path, engine: str, micro_steps: int = 1, *more: str) -> float:
    """What `fluxfill plan` reckons that each of two ranks gets in a step."""
    from configs import communication
    from configs.flux_shape import FluxShape
    from configs.loading import load_config
    from data.encoders.model_folder import read_part_config

    _, config, *overrides = settings(folder, 2, 2, 1, *more)
    shape = FluxShape.of(read_part_config(folder / "model", "transformer"))
    with patch.multiple(communication, ZERO_BUCKET=DEEPSPEED_LIMIT, ZERO3_LIVE=DEEPSPEED_LIMIT):
        exchanged = communication.exchanges(
            load_config(Path(config), overrides), shape, engine, nodes=1, gpus_per_node=2
        )
    return exchanged.of_step(micro_steps).node


def measure(folder: Path, engine: str, parameters: int, *, steps: int, repeats: int) -> dict[str, Any]:
    """Two ranks of an engine over one, in turn."""
    alone, several = LAUNCHES[engine]
    shares: dict[str, list[float]] = {"cpu": [], "wall": []}
    for repeat in range(repeats):
        (one,) = launch(alone, 1, [*settings(folder, 1, steps), f"run.name={engine}-1-{repeat}"], steps)
        two = launch(several, 2, [*settings(folder, 2, steps), f"run.name={engine}-2-{repeat}"], steps)
        for key, values in shares.items():
            values.append(two[0][key] / one[key])
    counted = bytes_received(two[0])
    return {
        "benchmark": "scaling",
        "engine": engine,
        "parameters": parameters,
        "steps": steps,
        "repeats": repeats,
        "cpu_seconds_of_one_rank": round(statistics.median(shares["cpu"]), 3),
        "seconds_of_one_rank": round(statistics.median(shares["wall"]), 3),
        "bytes": round(sum(counted.values())),
        "bytes_a_parameter": round(sum(counted.values()) / parameters, 3),
        "by_plan_a_parameter": round(bytes_by_plan(folder, engine) / parameters, 3),
        "bytes_a_parameter_by_collective": {name: round(size / parameters, 3) for name, size in counted.items()},
        "bytes_of_one_rank": sum(one["moved"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the results to this file, a JSON line each")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3, help="of each pair of runs")
    parser.add_argument("--engines", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        parameters = make_inputs(Path(name))
        for engine in options.engines:
            line = measure(Path(name), engine, parameters, steps=options.steps, repeats=options.repeats)
            add_result(line, options.out)


if __name__ == "__main__":
    main()
