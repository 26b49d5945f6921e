"""Which methods, base precisions, optimizers and engines work together; why the others do not, and what comes nearest.

Everything is said here once: the check of a config, the check at start, the notes in the log and the page
docs/combinations.md all read these rules.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, NamedTuple, get_args

from configs.errors import InputError, WhatAndCure
from configs.schema import Config, EngineName

ADAPTERS = ("lora", "dora", "lokr")
QuantizedPrecision = Literal["int8", "nf4", "fp8"]
QUANTIZED: tuple[QuantizedPrecision, ...] = get_args(QuantizedPrecision)
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
FSDP = tuple(engine for engine in ENGINES if engine.startswith(("fsdp2", "hsdp")))
ZERO = tuple(engine for engine in ENGINES if engine.startswith("zero"))
OFFLOAD = tuple(engine for engine in ENGINES if engine.endswith("-offload"))
ZERO3 = tuple(engine for engine in ZERO if engine.startswith("zero3"))

# The values of each key, those first that are offered first in the place of one that does not work. Keys too are in
# that order: another optimizer is a smaller change than another engine, and far smaller than another method.
CHOICES: dict[str, tuple[str, ...]] = {
    "compile": ("off", "regional"),
    "optimizer": ("adamw8bit", "adamw", "adafactor", "prodigy"),
    "engine": tuple(dict.fromkeys(("fsdp2", "ddp", "zero2", *reversed(ENGINES)))),  # single comes last
    "precision": ("int8", "nf4", "bf16", "fp8", "fp32", "auto"),
    "weights": ("fp32_master", "bf16_stochastic"),
    "method": ("lora", "dora", "lokr", "full"),
}
KEYS = {
    "compile": "train.compile",
    "optimizer": "train.optimizer",
    "engine": "parallel.engine",
    "precision": "model.precision",
    "weights": "train.weights",
    "method": "method.type",
}


@dataclass(frozen=True)
class Combination:
    """What a run combines, by the config's words; the engine is one of CHOICES, never auto."""

    method: str
    precision: str
    optimizer: str
    engine: str
    weights: str = "fp32_master"
    compile: str = "off"


@dataclass(frozen=True)
class Rule:
    """Something about the combinations in which every key of `when` has one of the values given there."""

    when: Mapping[str, tuple[str, ...]]
    text: str

    def fits(self, combination: Combination) -> bool:
        return all(getattr(combination, key) in values for key, values in self.when.items())


REFUSED: tuple[Rule, ...] = (
    Rule(
        {"method": ("full",), "precision": QUANTIZED},
        "full training changes every weight of the base, and a quantized weight cannot take a small change",
    ),
    Rule(
        {"optimizer": ("adafactor",), "engine": (*FSDP, *ZERO)},
        "adafactor needs whole rows and columns of a weight's gradient, and here each process holds a slice of it",
    ),
    Rule(
        {"optimizer": ("prodigy",), "engine": (*FSDP, *ZERO)},
        "prodigy finds its step size from all weights together, and here each process would find one of its own",
    ),
    Rule(
        {"precision": QUANTIZED, "engine": ZERO3},
        "DeepSpeed shards plain numbers, without the shape and the scales of a quantized weight",
    ),
    Rule(
        {"weights": ("bf16_stochastic",), "method": ADAPTERS},
        "an adapter is small, and always trains in fp32",
    ),
    Rule(
        {"weights": ("bf16_stochastic",), "optimizer": ("adamw8bit", "adafactor", "prodigy")},
        "stochastic rounding is part of AdamW here, and rounds its two moments too",
    ),
    Rule(
        {"weights": ("bf16_stochastic",), "precision": ("fp32",)},
        "weights that are kept in bf16 are computed with in bf16",
    ),
    Rule(
        {"weights": ("bf16_stochastic",), "engine": ZERO},
        "DeepSpeed keeps weights in fp32 beside those in bf16",
    ),
    Rule(
        {"compile": ("regional",), "engine": ZERO},
        "zero3 gathers weights in hooks of the layers inside a block, which would become part of its graph, and zero1 "
        "and zero2 have not been tried",
    ),
)

# What is done in another way than the words say. It goes to the log of every run that it concerns.
NOTES: tuple[Rule, ...] = (
    Rule(
        {"optimizer": ("adamw8bit",), "engine": FSDP},
        "bitsandbytes works on the local shards, whose 8-bit state is quantized again where another engine or number "
        "of processes goes on",
    ),
    Rule(
        {"optimizer": ("adamw8bit",), "engine": ZERO},
        "bitsandbytes works on each process's flat partition, whose 8-bit state is quantized again where another "
        "engine or number of processes goes on",
    ),
    Rule(
        {"optimizer": ("adamw8bit",), "engine": OFFLOAD},
        "bitsandbytes has no kernels for a CPU, and there takes many times as long as adamw: train.optimizer=adamw is "
        "the better choice where host memory holds its state, 8 bytes a weight",
    ),
    Rule(
        {"engine": ("zero1",)},
        "where products are computed in bf16, DeepSpeed adds the gradients of micro-batches up in bf16, and from zero2 "
        "on in fp32",
    ),
    Rule(
        {"method": ("dora",), "engine": ZERO},
        "where products are computed in bf16, DeepSpeed hands out the lengths of the rows in bf16 too, and small "
        "changes of them show late",
    ),
    Rule(
        {"precision": ("nf4",), "engine": FSDP},
        "the packed 4-bit weights are stored as bf16 tensors, the only kind that is sharded and gathered unharmed",
    ),
    Rule(
        {"weights": ("bf16_stochastic",)},
        "the two moments are kept in bf16 too, and gradients of micro-batches are added up in it; what is rounded "
        "which way depends on the shard, so a resumed run is bit-equal on the same number of processes only (on a GPU "
        "with train.deterministic)",
    ),
    Rule(
        {"precision": ("int8", "fp8")},
        "torchao quantizes the blocks' weights, with a scale per row of int8 and one per weight of fp8; products are "
        "computed in bf16 from weights made whole for the moment, on any card",
    ),
)


@dataclass(frozen=True)
class Refusal:
    """Why a combination cannot be trained, by all rules that are against it, and the nearest one that can."""

    asked: Combination
    rules: tuple[Rule, ...]
    nearest: Combination

    @property
    def changes(self) -> dict[str, str]:
        """Key of Combination -> value, of what the nearest combination has otherwise."""
        return {
            key: getattr(self.nearest, key) for key in KEYS if getattr(self.asked, key) != getattr(self.nearest, key)
        }

    def explain(self) -> "list[Mismatch]":
        """What does not go together and why, of each rule, and what to write instead to keep them all."""
        instead = ", ".join(f"{KEYS[key]}={value}" for key, value in self.changes.items())
        found = []
        for rule in self.rules:
            pair = [f"{KEYS[key]} {getattr(self.asked, key)}" for key in rule.when]
            what = f"{' and '.join(pair)} do not go together: {rule.text}"
            changed = next(key for key in self.changes if key in rule.when)
            problem = WhatAndCure(what, f"Nearest that works: {instead}.")
            found.append(Mismatch(KEYS[changed], tuple(KEYS[key] for key in rule.when), problem))
        return found


class Mismatch(NamedTuple):
    """Keys of a config that do not go together. key: the one to change.  keys: all that it was judged by."""

    key: str
    keys: tuple[str, ...]
    problem: WhatAndCure


def started_engine(asked: Literal["auto", EngineName], processes: int) -> EngineName:
    """The engine that a number of processes is started with, for `parallel.engine`: auto is ddp, or single for one."""
    if asked != "auto":
        return asked
    return "ddp" if processes > 1 else "single"


def combination_of(config: Config, engine: str) -> Combination:
    """What a config combines under an engine that is decided."""
    train = config.train
    return Combination(
        config.method.type, config.model.precision, train.optimizer, engine, train.weights, train.compile
    )


def refuse(combination: Combination) -> Refusal | None:
    """Why the combination does not work, or None if it does."""
    rules = tuple(rule for rule in REFUSED if rule.fits(combination))
    return Refusal(combination, rules, _nearest(combination)) if rules else None


def _nearest(asked: Combination) -> Combination:
    """The working combination with the smallest change."""

    def distance(found: Combination) -> tuple[int, list[int]]:
        changed = [getattr(found, key) != getattr(asked, key) for key in CHOICES]
        # Each key weighs as much as all before it together.
        size = sum(2**place for place, differs in enumerate(changed) if differs)
        return size, [values.index(getattr(found, key)) for key, values in CHOICES.items()]

    return min(_working(), key=distance)


def all_combinations() -> Iterator[Combination]:
    """Every combination there is, working or not."""
    for values in product(*CHOICES.values()):
        yield Combination(**dict(zip(CHOICES, values, strict=True)))


@cache
def _working() -> tuple[Combination, ...]:
    return tuple(found for found in all_combinations() if _works(found))


def _works(combination: Combination) -> bool:
    return not any(rule.fits(combination) for rule in REFUSED)


def find_refused(config: Config) -> list[Mismatch]:
    """Why no engine that a config allows can train it; of auto, which may become any, what is in the way of one
    process, which no rule for engines forbids: the combination itself."""
    asked = config.parallel.engine
    refusal = refuse(combination_of(config, "single" if asked == "auto" else asked))
    return refusal.explain() if refusal else []


def check_engine(config: Config, engine: str) -> None:
    """Raise InputError if the config cannot be trained under the engine that auto, or the launch, has come to."""
    if refusal := refuse(combination_of(config, engine)):
        problems = (found.problem for found in refusal.explain())
        raise InputError(*(WhatAndCure(f"under {engine}, {what}", cure) for what, cure in problems))


def notes_of(config: Config, engine: str) -> list[str]:
    """What the run does in another way than the config's words say, for its log."""
    combination = combination_of(config, engine)
    found = []
    for rule in NOTES:
        if rule.fits(combination):
            subject = " under ".join(getattr(combination, key) for key in rule.when)
            found.append(f"{subject}: {rule.text}")
    return found
