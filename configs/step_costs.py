"""What one micro-step of FLUX.1 takes, from the table that trainer/simulation/table.py makes: activations, arithmetic,
bytes moved and kernels, by fake tensors. Nothing in it was measured on a GPU.

The table holds, for 512 and 1,536 or more tokens, what lies outside the blocks and what one block of each kind adds. Of
tokens and of an adapter's rank everything is a line (attention's arithmetic, a square of the tokens, is by formula).
"""

import json
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from configs.combinations import QUANTIZED
from configs.flux_shape import FluxShape
from configs.schema import DoraConfig, FullConfig, LokrConfig, LoraConfig

TABLE = Path(__file__).with_suffix(".json")
METHODS = LoraConfig | DoraConfig | LokrConfig | FullConfig
_WIDTH = FluxShape().width


@dataclass(frozen=True)
class BlockCosts:
    """A quantity that adds up over the model.  outside: of its blocks.  double, single: of one block of the kind."""

    outside: float
    double: float
    single: float


@dataclass(frozen=True)
class Row:
    """A row of the table, or a point between two: of one sample.

    kept: bytes of activations from the forward to the backward pass.  matmul_flops: of matrix products.  traffic: bytes
    that all but these and attention read and write.  kernels: that start.  single_live, double_live: bytes beside what
    is kept, at most, while the backward pass is in a block of the kind.
    """

    kept: BlockCosts
    matmul_flops: BlockCosts
    traffic: BlockCosts
    kernels: BlockCosts
    single_live: float
    double_live: float


@dataclass(frozen=True)
class StepCost:
    """Of one micro-step on one GPU.  kept, peak: bytes above weights and gradients.  traffic: bytes."""

    kept: float
    peak: float
    matmul_flops: float
    attention_flops: float
    traffic: float
    kernels: float

    def after(self, other: "StepCost") -> "StepCost":
        """Of both, of which the other is over, and holds nothing any more, when this one begins."""
        return StepCost(
            max(self.kept, other.kept),
            max(self.peak, other.peak),
            self.matmul_flops + other.matmul_flops,
            self.attention_flops + other.attention_flops,
            self.traffic + other.traffic,
            self.kernels + other.kernels,
        )


def step_cost(
    method: METHODS, precision: str, shape: FluxShape, *, checkpointed: int, tokens: int, rows: int = 1
) -> StepCost:
    """Cost of one micro-step on one GPU.

    checkpointed: blocks, the first of the forward pass.  tokens: of one sample, text included.  rows: of the
    micro-batch.
    """
    kept, again = _rows_at(*_key(method, precision), _rank(method), tokens * rows)
    return cost_of_rows(kept, again, shape, checkpointed=checkpointed, tokens=tokens, rows=rows)


def base_pass(precision: str, shape: FluxShape, *, tokens: int, rows: int = 1) -> StepCost:
    """The frozen base's forward pass without gradients, of a micro-batch: what its blocks take to be computed again.

    Its memory, less than a backward pass takes, counts as none.  tokens: of one sample, text included.
    """
    _, _, word = _key(FullConfig(type="full"), precision)
    work = _computed_again("full", "fp32" if word == "fp32" else "bf16", shape, tokens * rows)
    if word == "int8":  # what making the weights whole adds
        quantized, plain = (_computed_again("lora", base, shape, tokens * rows) for base in (word, "bf16"))
        work = {name: value + quantized[name] - plain[name] for name, value in work.items()}
    wide = shape.width / _WIDTH
    attention = rows * shape.blocks * _attention_pass(shape, tokens)
    return StepCost(0, 0, wide**2 * work["matmul_flops"], attention, wide * work["traffic"], work["kernels"])


def _computed_again(method: str, precision: str, shape: FluxShape, tokens: int) -> dict[str, float]:
    """What checkpointing adds in all blocks of FLUX.1's width, by quantity.  Of an adapter's own work nothing."""
    kept, again = _rows_at(method, "all", precision, 0, tokens)
    found = {}
    for name in ("matmul_flops", "traffic", "kernels"):
        once, twice = getattr(kept, name), getattr(again, name)
        doubles, singles = twice.double - once.double, twice.single - once.single
        found[name] = shape.double_blocks * doubles + shape.single_blocks * singles
    return found


def cost_of_rows(kept: Row, again: Row, shape: FluxShape, *, checkpointed: int, tokens: int, rows: int = 1) -> StepCost:
    """The cost of a step whose blocks take what a row says of those that keep their activations, and another one of
    those that are checkpointed.  kept, again: of all tokens of the micro-batch."""
    doubles = min(checkpointed, shape.double_blocks)
    singles = checkpointed - doubles
    plain_doubles, plain_singles = shape.double_blocks - doubles, shape.single_blocks - singles

    def total(name: str) -> float:
        return _total(getattr(kept, name), getattr(again, name), (doubles, singles), (plain_doubles, plain_singles))

    # The backward pass goes from the last block to the first, and what a block has kept is gone when it has left it.
    moments = (
        (plain_singles, (doubles, singles), (plain_doubles, plain_singles), kept.single_live),
        (singles, (doubles, singles), (plain_doubles, 0), again.single_live),
        (plain_doubles, (doubles, 0), (plain_doubles, 0), kept.double_live),
        (doubles, (doubles, 0), (0, 0), again.double_live),
    )
    peak = max(
        _total(kept.kept, again.kept, checkpointed_there, plain_there) + live
        for blocks, checkpointed_there, plain_there, live in moments
        if blocks
    )
    wide = shape.width / _WIDTH
    return StepCost(
        wide * total("kept"),
        wide * peak,
        wide**2 * total("matmul_flops"),
        rows * attention_flops(shape, tokens, checkpointed=checkpointed),
        wide * total("traffic"),
        total("kernels"),
    )


def _total(kept: BlockCosts, again: BlockCosts, checkpointed: tuple[int, int], plain: tuple[int, int]) -> float:
    """Of all that is outside the blocks, and of so many double and single ones of each sort."""
    # The first block is a case of its own, since its input needs no gradient, and counts as outside.
    outside = again.outside if any(checkpointed) else kept.outside
    blocks = checkpointed[0] * again.double + checkpointed[1] * again.single
    return outside + blocks + plain[0] * kept.double + plain[1] * kept.single


def attention_flops(shape: FluxShape, tokens: int, *, checkpointed: int) -> float:
    """Of one sample, forward and backward: two products of tokens x tokens a head in the forward pass, four in the
    backward pass; those that FlashAttention computes again are not counted."""
    return ((1 + 2) * shape.blocks + checkpointed) * _attention_pass(shape, tokens)


def _attention_pass(shape: FluxShape, tokens: int) -> float:
    """Of one block's forward pass."""
    return 4 * tokens**2 * shape.width


Key = tuple[str, str, str]


def _key(method: METHODS, precision: str) -> Key:
    """(method, layers, precision), by the table's words. A list of layers counts as all of them."""
    layers = "all" if method.type == "full" or method.targets != "attention" or method.type != "lora" else "attention"
    word = {"auto": "bf16"} | dict.fromkeys(QUANTIZED, "int8")  # all of them keep what the forward pass made, in bf16
    return method.type, layers, word.get(precision, precision)


def _rank(method: METHODS) -> int:
    return 0 if method.type == "full" else method.rank


@lru_cache(maxsize=4096)  # a plan asks for each number of checkpointed blocks
def _rows_at(method: str, layers: str, precision: str, rank: int, tokens: int) -> tuple[Row, Row]:
    """The table's rows, without checkpointing and with it, on the line through its ranks and numbers of tokens."""
    found = []
    for checkpointing in (False, True):
        points = _table()[method, layers, precision, checkpointing]
        ranks = sorted({point for point, _ in points})
        sizes = sorted({size for _, size in points})
        at_ranks = {point: _on_line(tokens, {size: points[point, size] for size in sizes}) for point in ranks}
        found.append(_on_line(rank, at_ranks))
    return found[0], found[1]


def _on_line(place: float, rows: dict[int, Row]) -> Row:
    """Between the nearest two of several, and beyond them on their line."""
    if len(rows) == 1:
        return next(iter(rows.values()))
    places = sorted(rows)
    index = next((number for number in range(1, len(places)) if place <= places[number]), len(places) - 1)
    low, high = places[index - 1], places[index]
    share = (place - low) / (high - low)
    return _mix(rows[low], rows[high], share)


def _mix(low: Any, high: Any, share: float) -> Any:
    """Numbers, or dataclasses of them, at a share of the way."""
    if isinstance(low, float | int):
        return low + share * (high - low)
    values = {field.name: _mix(getattr(low, field.name), getattr(high, field.name), share) for field in fields(low)}
    return type(low)(**values)


@cache
def _table() -> dict[tuple[*Key, bool], dict[tuple[int, int], Row]]:
    """(*key, checkpointing) -> (rank, tokens) -> row."""
    found: dict[tuple[*Key, bool], dict[tuple[int, int], Row]] = {}
    for raw in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]:
        key = (raw["method"], raw["layers"], raw["precision"], raw["checkpointing"])
        found.setdefault(key, {})[raw["rank"], raw["tokens"]] = row_of(raw)
    return found


def row_of(raw: dict[str, Any]) -> Row:
    """A row as the file holds it."""
    costs = {name: BlockCosts(*raw[name]) for name in ("kept", "matmul_flops", "traffic", "kernels")}
    return Row(**costs, single_live=raw["single_live"], double_live=raw["double_live"])
