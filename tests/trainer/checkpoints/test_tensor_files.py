"""Any range of any tensor is read, however the ranks that wrote it had cut it up."""

import hashlib
import json
import weakref
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import InputError
from trainer.checkpoints.tensor_files import INDEX, Span, StateFiles, rank_file, write_index, write_tensors
from trainer.optimizers.state import dequantize, quantize


@pytest.mark.parametrize("cuts", [[], [7], [1, 2, 9]])
def test_every_range_is_read_out_of_the_slices_of_any_number_of_ranks(tmp_path, cuts):
    whole = torch.arange(10.0)
    edges = [0, *cuts, 10]
    spans = {}
    for rank, (start, stop) in enumerate(pairwise(edges)):
        write_tensors(tmp_path / rank_file(rank), {"weight/a": whole[start:stop].clone()})
        spans[rank] = {"weight/a": Span(start, stop)}
    write_index(tmp_path, spans, {"a": 10})
    files = StateFiles(tmp_path)
    assert (files.names(), files.kinds(), files.sizes) == (["weight/a"], {"weight"}, {"a": 10})
    for start in range(10):
        for count in range(11 - start):
            assert torch.equal(files.read("weight", "a", start, count), whole[start : start + count])
    with pytest.raises(InputError, match="holds no ema/a"):
        files.read("ema", "a", 0, 1)


def test_a_file_is_a_safetensors_file_and_its_sha256_that_of_what_was_written(tmp_path):
    """Types of several sizes, of which an odd number of bytes would put those behind it at odd places."""
    tensors = {
        "state/a//state1": torch.randint(0, 255, (3, 257), dtype=torch.uint8),
        "state/a//learned": torch.randn(4, dtype=torch.float64),
        "weight/a": torch.randn(5),
        "weight/b": torch.randn(7, 3).bfloat16().T,  # not contiguous
        "ema/b": torch.nn.Parameter(torch.randn(21)),
        "state/a//count": torch.tensor(3, dtype=torch.int32),
        "state/a//none": torch.empty(0),
    }
    path = tmp_path / rank_file(0)
    sha256 = write_tensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_more_than_one_tensor_is_copied_to_the_host_at_a_time(tmp_path, monkeypatch):
    alive, most = [], []
    copy = torch.Tensor.to

    def to(self, *given, **options):
        copied = copy(self, *given, **options, copy=True)  # as from a GPU
        alive.append(weakref.ref(copied))
        most.append(sum(held() is not None for held in alive))
        return copied

    monkeypatch.setattr(torch.Tensor, "to", to)
    write_tensors(tmp_path / rank_file(0), {f"weight/{name}": torch.randn(1000) for name in "abcdef"})
    assert len(most) == 6 and max(most) <= 2  # the one before is let go once the next is there


def test_8_bit_moments_are_read_out_of_the_tensors_of_several_ranks(tmp_path):
    """Rank 0 holds b's start behind a in one flat partition, rank 1 the rest of b in a small tensor kept in fp32."""
    codes, scales = quantize(torch.randn(40, 256), "state1")
    numbers, small = dequantize(codes, scales, "state1").view(-1), torch.randn(24)
    partition = {"state/partition 0//state1": codes, "state/partition 0//absmax1": scales}
    write_tensors(tmp_path / rank_file(0), partition)
    write_tensors(tmp_path / rank_file(1), {"state1/b": small})
    spans = {
        0: {"state1/a": Span(0, 240, "partition 0", 0), "state1/b": Span(0, 10000, "partition 0", 240)},
        1: {"state1/b": Span(10000, 10024)},
    }
    write_index(tmp_path, spans, {"a": 240, "b": 10024})
    files = StateFiles(tmp_path)
    assert files.kinds() == {"state1"}
    assert torch.equal(files.read("state1", "a", 0, 240), numbers[:240])
    assert torch.equal(files.read("state1", "b", 9990, 30), torch.cat([numbers[10230:10240], small[:20]]))
    assert files.read_bound(0).keys() == {"partition 0//state1", "partition 0//absmax1"} and files.read_bound(1) == {}
    assert json.loads((tmp_path / INDEX).read_text())["tensors"]["state1/a"] == [
        [0, 240, rank_file(0), "partition 0", 0]
    ]


@pytest.mark.parametrize("starts_at", [90, 120])
def test_slices_that_leave_a_gap_or_overlap_are_not_saved(tmp_path, starts_at):
    spans = {0: {"state1/b": Span(0, 100, "b", 0)}, 1: {"state1/b": Span(starts_at, 200, "b", 0)}}
    saved = rf"state1/b has 200 elements, saved are \[\[0, 100\], \[{starts_at}, 200\]\]"
    with pytest.raises(RuntimeError, match=saved):
        write_index(tmp_path, spans, {"b": 200})
