"""Bootstrap intervals over pictures: of means, and of paired differences."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LEVEL = 0.95
_RESAMPLES = 4000
_SEED = 15  # the same interval for the same pictures
_FEWEST = 3  # of which the bootstrap says anything


@dataclass(frozen=True)
class Interval:
    """A mean over n pictures, and the percentile interval of LEVEL that holds it; of one picture, both ends are it."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_of_too_few(self) -> bool:
        """Whether it is of one picture, or two, which prove nothing."""
        return self.n < _FEWEST

    @property
    def excludes_zero(self) -> bool:
        """Whether it is more than noise, for a mean of differences."""
        return not self.is_of_too_few and (self.low > 0 or self.high < 0)

    def __neg__(self) -> "Interval":
        return Interval(-self.mean, -self.high, -self.low, self.n)

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high


def bootstrap(values: np.ndarray) -> Interval:
    """The interval of a mean: pictures are drawn again with replacement, as another set of pictures would be."""
    means = values[_draws(len(values))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def paired_difference(values: np.ndarray, others: np.ndarray) -> Interval:
    """Of values - others, picture by picture: what all pictures share (some are harder) cancels out."""
    return bootstrap(values - others)


@lru_cache(maxsize=8)
def _draws(count: int) -> np.ndarray:
    return np.random.default_rng(_SEED).integers(count, size=(_RESAMPLES, count))
