from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.data_schema import CaptionsConfig, EncodersConfig
from configs.errors import InputError
from data.cache.dropout_tensors import (
    dropout_tensors_are_current,
    read_empty_caption,
    read_full_mask,
    write_dropout_tensors,
)
from data.cache_layout import EMPTY_TEXT, full_mask_name
from data.encoders.load import load_encoders
from data.samples.geometry import Bucket

BUCKETS = [Bucket(32, 48), Bucket(48, 32)]
CAPTIONS = CaptionsConfig(text_length=16)
ENCODING = {"encoders": {"vae": "a"}}


@pytest.fixture(scope="module")
def encoders(tiny_model):
    return load_encoders(tiny_model, EncodersConfig(vae="cpu", clip="cpu", t5="cpu"), device_index=0)


@pytest.fixture
def written(encoders, tmp_path):
    write_dropout_tensors(tmp_path, encoders, BUCKETS, ENCODING, CAPTIONS, lambda: None)
    return tmp_path


def test_what_was_written_is_current_until_the_encoding_or_a_file_changes(written):
    assert sorted(path.name for path in written.iterdir()) == sorted(
        [EMPTY_TEXT, *(full_mask_name(str(bucket)) for bucket in BUCKETS)]
    )
    assert dropout_tensors_are_current(written, BUCKETS, ENCODING)
    assert not dropout_tensors_are_current(written, [*BUCKETS, Bucket(64, 64)], ENCODING)
    assert not dropout_tensors_are_current(written, BUCKETS, {"encoders": {"vae": "b"}})
    path = written / full_mask_name(str(BUCKETS[0]))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert not dropout_tensors_are_current(written, BUCKETS, ENCODING)
    assert dropout_tensors_are_current(written, BUCKETS[1:], ENCODING)


def test_they_are_written_with_the_same_bytes_again(written, encoders):
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    write_dropout_tensors(written, encoders, BUCKETS, ENCODING, CAPTIONS, lambda: None)
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before


def test_nothing_is_written_once_the_claim_is_lost(encoders, tmp_path):
    def lost():
        raise KeyError("claim")

    with pytest.raises(KeyError):
        write_dropout_tensors(tmp_path, encoders, BUCKETS, ENCODING, CAPTIONS, lost)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_gets_the_stored_bytes_and_a_mask_that_is_all_hole(make_cache):
    cache, bucket = make_cache([("photos", "48x64", 1)]), Bucket(48, 64)
    full = read_full_mask(cache, bucket)
    assert full.keys() == {"masked_latents", "mask"}
    assert np.unpackbits(np.frombuffer(full["mask"], dtype=np.uint8)).sum() == 48 * 64
    for found, name in ((full, full_mask_name("48x64")), (read_empty_caption(cache), EMPTY_TEXT)):
        for tensor, stored in load_file(cache.folder / name).items():
            assert (
                torch.frombuffer(found[tensor], dtype=torch.uint8).tolist()
                == stored.view(torch.uint8).view(-1).tolist()
            )


def test_a_file_that_the_manifest_does_not_know_is_refused(make_cache):
    cache, bucket = make_cache([("photos", "48x64", 1)]), Bucket(48, 64)
    with pytest.raises(InputError, match=rf"{EMPTY_TEXT}: cannot be read \(it holds .*\[8, 6\].*, not .*\[1, 6\]"):
        read_empty_caption(replace(cache, manifest=replace(cache.manifest, text_length=1)))
    path = cache.folder / full_mask_name("48x64")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"blank_48x64.*: cannot be read \(its checksum differs\)\. Delete it and run"):
        read_full_mask(cache, bucket)
