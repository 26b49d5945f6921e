"""Keys of two sections that do not go together, beside the combinations of configs/combinations.py."""

from collections.abc import Iterator

from configs.combinations import Mismatch
from configs.errors import WhatAndCure
from configs.schema import Config
from configs.slurm_schema import problem_of_signal


def find_contradictions(config: Config) -> Iterator[Mismatch]:
    """What a config asks for that another section rules out."""
    if config.flow.keep_target == "base" and config.method.type == "full":
        yield Mismatch(
            "flow.keep_target",
            ("flow.keep_target", "method.type"),
            WhatAndCure(
                "flow.keep_target base and method.type full do not go together: the base is what trains, and nothing "
                "of it stays frozen",
                "Set flow.keep_target=picture, or train an adapter.",
            ),
        )
    if config.validation.weights == "ema" and config.train.ema_decay is None:
        yield Mismatch(
            "validation.weights",
            ("validation.weights", "train.ema_decay"),
            WhatAndCure(
                "validation.weights is ema, but train.ema_decay is null, so no average is kept",
                "Set train.ema_decay=0.999, or validation.weights=live.",
            ),
        )


def find_late_signal(config: Config) -> Iterator[Mismatch]:
    """What of `slurm` would end a job before it has done much."""
    if problem := problem_of_signal(config.slurm):
        yield Mismatch("slurm.signal_seconds", ("slurm.signal_seconds", "slurm.time"), problem)
