import numpy as np
import pytest

from trainer.evaluation.intervals import bootstrap, paired_difference


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    random = np.random.default_rng(1)
    held = [(found := bootstrap(random.normal(3, 2, 30))).low <= 3 <= found.high for _ in range(200)]
    assert 0.87 < np.mean(held) < 0.99


def test_more_pictures_make_it_narrower():
    values = np.random.default_rng(2).normal(0, 1, 400)
    few, many = bootstrap(values[:25]), bootstrap(values)
    assert many.high - many.low < (few.high - few.low) / 2.5


def test_a_small_gain_on_every_picture_is_seen_through_large_differences_between_them():
    """What pairing is for: the means' own intervals overlap."""
    hard = np.random.default_rng(3).normal(20, 5, 16)
    gained = hard + 0.5 + np.random.default_rng(4).normal(0, 0.1, 16)
    assert bootstrap(hard).overlaps(bootstrap(gained))
    gain = paired_difference(gained, hard)
    assert gain.excludes_zero and gain.low == pytest.approx(0.5, abs=0.15)


def test_noise_is_called_noise():
    random = np.random.default_rng(5)
    called = [paired_difference(random.normal(0, 1, 20), random.normal(0, 1, 20)).excludes_zero for _ in range(100)]
    assert np.mean(called) < 0.15


def test_one_or_two_pictures_prove_nothing():
    assert not bootstrap(np.array([5.0])).excludes_zero and not bootstrap(np.array([5.0, 5.0])).excludes_zero


def test_the_same_pictures_have_the_same_interval():
    values = np.random.default_rng(6).normal(0, 1, 12)
    assert bootstrap(values) == bootstrap(values.copy())
