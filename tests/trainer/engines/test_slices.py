import pytest

from trainer.engines.slices import assign_owners


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [[], [5], [1] * 24, [10, 1, 1, 10, 3, 3, 7], [0, 0, 4]])
def test_every_tensor_has_one_owner_and_owners_come_in_order(sizes, world_size):
    owners = assign_owners(sizes, world_size)
    assert len(owners) == len(sizes)
    assert owners == sorted(owners)
    assert all(0 <= owner < world_size for owner in owners)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_own_about_as_much_as_each_other(world_size):
    sizes = [1 + number % 5 for number in range(1000)]
    owners = assign_owners(sizes, world_size)
    shares = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == r) for r in range(world_size)]
    assert max(shares) - min(shares) <= 2 * max(sizes)
