"""Everything random about one sample, as a pure function of (seed, position in the order).

numpy's Philox is counter based: a key and a counter give the numbers, no generator has a history. So the draws of a
sample are the same on any rank, any device, after any resume. A position counts rows from the start of the run and
never comes twice, so it carries the epoch too.
"""

import threading

import numpy as np

# The purposes of a sample's numbers: the highest word of the counter, so their streams never meet.
_SIGMA, _NOISE, _VARIANT, _DROPOUT, _WHOLE_HOLE, _UNMASKED = range(6)


class _Generators(threading.local):
    """A generator for each thread: making one for every draw takes five times as long as resetting it."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=[0, 0])
        self.generator = np.random.Generator(self.bits)
        self.start = self.bits.state  # as a new one has it


_generators = _Generators()


def _generator(seed: int, position: int, purpose: int) -> np.random.Generator:
    """As Generator(Philox(key=[seed, position], counter=[0, 0, 0, purpose])); good until the thread's next call."""
    start = _generators.start
    start["state"]["key"][:] = seed, position
    start["state"]["counter"][3] = purpose
    _generators.bits.state = start
    return _generators.generator


def draw_uniform(seed: int, position: int) -> float:
    """The number a sample's sigma is made from: in the open interval (0, 1), never its ends."""
    # 52 bits and a half are exact in a double; with 53 the largest would round up to 1.
    return float((_generator(seed, position, _SIGMA).integers(1 << 52) + 0.5) / (1 << 52))


def draw_noise(seed: int, position: int, out: np.ndarray) -> None:
    """Fill `out` (float32, any shape) with the sample's standard normal noise."""
    _generator(seed, position, _NOISE).standard_normal(out=out, dtype=np.float32)


def draw_variant(seed: int, position: int, num_variants: int) -> int:
    """Which of the sample's mask variants is used: 0 to num_variants - 1, all alike."""
    return int(_generator(seed, position, _VARIANT).integers(num_variants))


def draw_caption_dropout(seed: int, position: int, probability: float) -> bool:
    """Whether the sample's caption is dropped (replaced by the empty one)."""
    return bool(_generator(seed, position, _DROPOUT).random() < probability)


def draw_mask_dropout(seed: int, position: int, probability: float) -> bool:
    """Whether the sample's mask is dropped (the hole is the whole picture)."""
    return bool(_generator(seed, position, _WHOLE_HOLE).random() < probability)


def draw_unmasked(seed: int, position: int, probability: float) -> bool:
    """Whether the sample's loss ignores its mask (hole and kept part weigh alike)."""
    return bool(_generator(seed, position, _UNMASKED).random() < probability)
