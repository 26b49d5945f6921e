import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from data.cache.members import LATENTS, MASKED, TEXT, bytes_of, num_bytes, parse_header, sample_tensors, text_tensors
from data.cache.shard_index import read_index
from data.cache_layout import EMPTY_TEXT
from data.samples.geometry import Bucket
from tests.data.made_caches import index_of


@pytest.mark.parametrize("text_dtype", ["bf16", "int8"])
def test_members_hold_what_the_schema_says(make_cache, text_dtype):
    cache = make_cache([("photos", "48x64", 2)], text_dtype=text_dtype)
    tar = cache.folder / str(cache.table.path[0])
    index, data = read_index(index_of(tar)), tar.read_bytes()
    expected = sample_tensors(Bucket(48, 64), cache.manifest)
    places = {LATENTS: index.latents[0], MASKED: index.masked[0, 0], TEXT: index.texts[0]}
    for kind, (offset, size) in places.items():
        begin, entries = parse_header(data[offset : offset + size])
        assert {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()} == expected[kind]
        assert size == begin + num_bytes(expected[kind])
    with safe_open(cache.folder / EMPTY_TEXT, "pt") as empty:
        assert set(empty.keys()) == text_tensors(cache.manifest).keys()


def test_a_header_is_read_with_what_follows_or_without():
    data = save({"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.uint8)}, metadata={"of": "nothing"})
    begin, entries = parse_header(data)
    assert entries.keys() == {"a", "b"} and entries["a"]["shape"] == [2, 3]
    assert begin == len(data) - num_bytes({"a": ("F32", [2, 3]), "b": ("U8", [1])})
    assert parse_header(data[:begin])[0] == begin


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 16, b"\2" + b"\0" * 7 + b"[]", b"<!DOCTYPE html>" * 9])
def test_what_is_no_header_is_a_value_error(data):
    with pytest.raises(ValueError):  # noqa: PT011
        parse_header(data)


def test_the_bytes_of_a_tensor_are_its_own_memory():
    tensor = torch.zeros(2, 2, dtype=torch.bfloat16)
    view = bytes_of(tensor)
    view[:] = np.frombuffer(bytes_of(torch.ones(2, 2, dtype=torch.bfloat16)), dtype=np.uint8).data
    assert torch.equal(tensor.float(), torch.ones(2, 2))
