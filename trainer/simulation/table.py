"""The table of what a micro-step takes, configs/step_costs.json, from simulations of the real blocks.

    python -m trainer.simulation.table

Minutes on one core, without a GPU. Made again when the model's code, the trainer's step or a library changes what is
kept: tests/trainer/simulation/test_table.py compares a few rows.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from trainer.simulation import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()  # before torch

from configs.flux_shape import FluxShape
from configs.schema import DoraConfig, FullConfig, LokrConfig, LoraConfig
from configs.step_costs import METHODS, TABLE
from data.samples.geometry import Bucket

if TYPE_CHECKING:
    from trainer.simulation.step import Counted

TEXT = 512
_BUCKETS = (Bucket(512, 512), Bucket(1024, 1024))  # 1,536 and 4,608 tokens
_RANKS = (32, 128)


@dataclass(frozen=True)
class Entry:
    """Of which kind of step a row is."""

    method: METHODS
    layers: str
    precision: str
    checkpointing: bool
    bucket: Bucket


def entries() -> Iterator[Entry]:
    """Every row of the table."""
    methods: list[tuple[METHODS, str, tuple[str, ...]]] = [(FullConfig(type="full"), "all", ("bf16", "fp32"))]
    for rank in _RANKS:
        methods += [
            (LoraConfig(type="lora", rank=rank), "all", ("bf16", "int8", "fp32")),
            (LoraConfig(type="lora", rank=rank, targets="attention"), "attention", ("bf16", "int8", "fp32")),
            (DoraConfig(type="dora", rank=rank), "all", ("bf16", "int8", "fp32")),
            (LokrConfig(type="lokr", rank=rank), "all", ("bf16", "int8", "fp32")),
        ]
    for (method, layers, precisions), bucket in product(methods, _BUCKETS):
        for precision, checkpointing in product(precisions, (True, False)):
            yield Entry(method, layers, precision, checkpointing, bucket)


def simulate_row(entry: Entry) -> dict[str, Any]:
    """The row as the file holds it."""
    from trainer.simulation.step import StepKind, simulate_step

    kind = StepKind(entry.method, entry.precision, None if entry.checkpointing else 0)
    return {
        "method": entry.method.type,
        "layers": entry.layers,
        "rank": 0 if entry.method.type == "full" else entry.method.rank,
        "precision": entry.precision,
        "checkpointing": entry.checkpointing,
        "tokens": entry.bucket.tokens + TEXT,
        **costs_by(lambda doubles, singles: simulate_step(FluxShape(doubles, singles), kind, entry.bucket, text=TEXT)),
    }


def costs_by(simulate: Callable[[int, int], "Counted"]) -> dict[str, Any]:
    """What lies outside the blocks, and what a block of each kind adds, by three small models.

    simulate: numbers of double and of single blocks -> a step of that model.
    """
    one, two_doubles, two_singles = simulate(1, 1), simulate(2, 1), simulate(1, 2)
    costs: dict[str, Any] = {}
    for name in ("kept", "matmul_flops", "traffic", "kernels"):
        base = getattr(one, name)
        double, single = getattr(two_doubles, name) - base, getattr(two_singles, name) - base
        costs[name] = [base - double - single, double, single]
    outside, double, _ = costs["kept"]
    return {
        **costs,
        "single_live": two_singles.single_peak - two_singles.kept,
        "double_live": two_doubles.double_peak - (outside + 2 * double),
    }


def main() -> None:
    """Write the table."""
    import torch

    rows = []
    for entry in entries():
        rows.append(json.dumps(simulate_row(entry)))
        print(rows[-1], file=sys.stderr, flush=True)
    about = "Of one sample, by fake tensors on a pretended CUDA device: python -m trainer.simulation.table"
    head = json.dumps({"about": about, "torch": torch.__version__.partition("+")[0]})
    TABLE.write_text(head[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
