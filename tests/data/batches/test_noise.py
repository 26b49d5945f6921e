from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data.batches.noise import (
    draw_caption_dropout,
    draw_mask_dropout,
    draw_noise,
    draw_uniform,
    draw_unmasked,
    draw_variant,
)


def noise(seed, position, shape=(16, 8, 8)):
    out = np.empty(shape, np.float32)
    draw_noise(seed, position, out)
    return out


def all_draws(seed, position):
    return (
        noise(seed, position).tobytes(),
        draw_uniform(seed, position),
        draw_variant(seed, position, 1000),
        draw_caption_dropout(seed, position, 0.5),
        draw_mask_dropout(seed, position, 0.5),
        draw_unmasked(seed, position, 0.5),
    )


def test_the_draws_are_those_of_every_run_before():
    """A change here is a new order version: runs that are resumed would train on other noise."""
    values = noise(42, 1234567)
    np.testing.assert_allclose(values.flat[:3], [0.78644043, -1.06184947, -2.87533593], rtol=1e-6)
    np.testing.assert_allclose(np.abs(values).sum(dtype=np.float64), 817.9445, rtol=1e-6)
    assert [draw_uniform(42, position) for position in (0, 1, 10**12)] == [
        0.8201981478608876,
        0.443746921343274,
        0.37763305693970073,
    ]
    assert [draw_variant(42, position, 4) for position in range(12)] == [0, 2, 3, 3, 2, 2, 3, 3, 3, 0, 0, 0]
    dropped = [position for position in range(12) if draw_caption_dropout(42, position, 0.5)]
    assert dropped == [0, 1, 2, 3, 4, 5, 6, 11]


@pytest.mark.parametrize("seed", [0, 5, 2**53 + 1, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 3, 2**62])
def test_the_draws_are_numpys_philox_of_the_documented_key(seed, position):
    """Also after an odd number of 32-bit draws: nothing of one draw is left for the next."""
    for purpose, draw in ((0, draw_uniform), (2, lambda *key: draw_variant(*key, num_variants=3))):
        draw_variant(7, 7, 3)
        fresh = np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, purpose]))
        expected = (fresh.integers(1 << 52) + 0.5) / (1 << 52) if purpose == 0 else fresh.integers(3)
        assert draw(seed, position) == expected
    fresh = np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, 1]))
    np.testing.assert_array_equal(noise(seed, position), fresh.standard_normal((16, 8, 8), dtype=np.float32))
    fresh = np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, 4]))
    assert draw_mask_dropout(seed, position, 0.5) == (fresh.random() < 0.5)
    fresh = np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, 5]))
    assert draw_unmasked(seed, position, 0.5) == (fresh.random() < 0.5)


def test_a_draw_hangs_on_seed_and_position_alone():
    forwards = [all_draws(7, position) for position in range(50)]
    np.random.seed(1)  # the global generator, as other code leaves it
    backwards = [all_draws(7, position) for position in reversed(range(50))]
    assert forwards == backwards[::-1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda position: all_draws(7, position), range(50))) == forwards


def test_other_seeds_and_positions_have_other_draws():
    draws = [
        all_draws(seed, position)
        for seed in (0, 1, 2**53, 2**53 + 1, 2**63 - 1)
        for position in (0, 1, 2, 2**40, 2**40 + 1, 2**62)
    ]
    assert len({draw[0] for draw in draws}) == len(draws)
    assert len({draw[1] for draw in draws}) == len(draws)


def test_noise_does_not_hang_on_the_shape_it_is_asked_in():
    np.testing.assert_array_equal(noise(3, 5, (16, 6, 10)).ravel(), noise(3, 5, (960,)))


def test_noise_is_standard_normal():
    values = np.stack([noise(0, position) for position in range(400)]).astype(np.float64)  # 409,600 numbers
    assert abs(values.mean()) < 0.01
    assert abs(values.var() - 1) < 0.01
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.1
    neighbours = np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]
    assert abs(neighbours) < 0.01


def test_uniform_is_uniform_and_never_at_its_ends():
    values = np.array([draw_uniform(0, position) for position in range(20000)])
    assert 0 < values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert abs(counts - 2000).max() < 200
    # Every value is an odd multiple of 2^-53, and so are the least and the greatest: the ends cannot be drawn.
    assert all((value * 2**53) % 2 == 1 for value in values.tolist())


@pytest.mark.parametrize("num_variants", [1, 2, 3, 7])
def test_variants_come_alike(num_variants):
    draws = [draw_variant(0, position, num_variants) for position in range(7000)]
    counts = np.bincount(draws, minlength=num_variants)
    assert len(counts) == num_variants
    assert abs(counts - 7000 / num_variants).max() < 0.08 * 7000


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_as_often_as_asked(probability):
    dropped = np.mean([draw_caption_dropout(0, position, probability) for position in range(5000)])
    assert abs(dropped - probability) < 0.02
    if probability in (0.0, 1.0):
        assert dropped == probability
