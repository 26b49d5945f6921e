"""Whether copies fit is a question of a node, and answered for all ranks alike."""

from dataclasses import dataclass, field

import pytest
import torch

from configs.memory import GIB
from trainer.checkpoints import host_copies
from trainer.checkpoints.host_copies import HostCopies


@dataclass
class _Ranks:
    others: list

    def all_gather(self, own):
        return [own, *self.others]


@dataclass
class _Engine:
    """Rank 0 of two nodes of two ranks each.  others: (first rank of the node, bytes, those kept from before, bytes
    free) of ranks 1 to 3."""

    ranks: _Ranks
    rank: int = field(default=0)
    local_rank: int = field(default=0)


def of_bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")


@pytest.mark.parametrize(
    "own, others, short",
    [
        (40, [(0, 40, 100), (2, 40, 100), (2, 40, 100)], None),
        (
            50,
            [(0, 50, 100), (2, 40, 100), (2, 40, 100)],
            "takes 100.0 GiB of host memory, 100.0 are free on the node of rank 0",
        ),
        (
            40,
            [(0, 40, 100), (2, 40, 90), (2, 45, 80)],
            "takes 85.0 GiB of host memory, 80.0 are free on the node of rank 2",
        ),
        (99, [(0, 40, 100), (2, 40, 1), (2, 45, 1)], "on the node of rank 0, and 1 more have too little"),
    ],
)
def test_the_copies_of_a_nodes_ranks_have_to_fit_together(monkeypatch, own, others, short):
    monkeypatch.setattr(host_copies, "available_memory_bytes", lambda: 100.0 * GIB)
    engine = _Engine(_Ranks([(node, copy * GIB, 0, free * GIB) for node, copy, free in others]))
    found = HostCopies(engine).shortage({"weight/a": of_bytes(own * GIB)})
    assert found is None if short is None else found.endswith(short)


def test_a_system_that_does_not_tell_what_is_free_has_room(monkeypatch):
    monkeypatch.setattr(host_copies, "available_memory_bytes", lambda: None)
    assert HostCopies(_Engine(_Ranks([]))).shortage({"weight/a": of_bytes(10**15)}) is None


@pytest.mark.parametrize("free, is_kept", [(400 * 1024, True), (200 * 1024, False)])
def test_their_memory_is_kept_where_it_is_a_small_part_of_what_is_free(monkeypatch, free, is_kept):
    monkeypatch.setattr(host_copies, "available_memory_bytes", lambda: free)
    copies, weights = HostCopies(_Engine(_Ranks([]))), torch.randn(64 * 256)
    held = []  # else new memory may be the same
    for number in range(2):
        state = {"weight/a": weights + number, "ema/a": weights[: 64 * 64] * number}
        assert copies.shortage(state) is None
        taken = copies.take(state)
        assert all(taken[name].equal(state[name]) and taken[name] is not state[name] for name in state)
        held.append(taken)
    before, after = ([tensor.data_ptr() for tensor in taken.values()] for taken in held)
    assert (before == after) is is_kept


def test_their_memory_is_given_back_once_the_node_has_little_left(monkeypatch):
    free, copies, state = [1024.0], HostCopies(_Engine(_Ranks([]))), {"weight/a": torch.ones(64)}
    monkeypatch.setattr(host_copies, "available_memory_bytes", lambda: free[0])
    for left, is_kept in ((1024.0, True), (800.0, True), (700.0, False)):
        free[0] = left
        assert copies.shortage(state) is None
        copies.take(state)
        assert bool(copies._kept) is is_kept
    free[0] = 1024.0
    assert copies.shortage(state) is None and copies.take(state) and copies._kept
    free[0] = 10.0
    assert copies.shortage(state) and not copies._kept  # also where no copy is taken at all


def test_what_has_another_shape_than_before_is_copied_anew(monkeypatch):
    monkeypatch.setattr(host_copies, "available_memory_bytes", lambda: GIB)
    copies = HostCopies(_Engine(_Ranks([])))
    for state in ({"a": torch.ones(3)}, {"a": torch.zeros(4), "b": torch.ones(2)}, {"a": torch.ones(4).bfloat16()}):
        assert copies.shortage(state) is None
        taken = copies.take(state)
        assert taken.keys() == state.keys()
        assert all(taken[name].equal(state[name]) and taken[name].dtype == state[name].dtype for name in state)
