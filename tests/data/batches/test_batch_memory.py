from itertools import pairwise

import torch

from data.batches.batch_memory import BatchBuffer, BufferLease, buffer_bytes
from data.batches.micro_batch import row_fields
from data.samples.geometry import Bucket


def test_a_buffer_is_taken_when_it_is_filled_and_the_last_used_first(make_cache):
    bucket, manifest = Bucket(32, 32), make_cache([("a", "32x32", 1)]).manifest
    fields = row_fields(bucket, manifest)
    buffers = [BatchBuffer(buffer_bytes(fields, 2), pin=False) for _ in range(3)]
    free = list(buffers)
    begun = [BufferLease(free, bucket, fields, 2) for _ in range(3)]
    assert free == buffers, "nothing is filled yet"
    first = begun[0].rows().batch.latents.data_ptr()
    assert begun[0].rows().batch.latents.data_ptr() == first
    assert len(free) == 2
    begun[0].give_back()
    assert begun[1].rows().batch.latents.data_ptr() == first, "it is still in the processor's cache"
    assert begun[2].rows().batch.latents.data_ptr() != first


def test_a_padding_row_is_finite_and_nothing_of_the_row_before(make_cache):
    bucket, manifest = Bucket(32, 32), make_cache([("a", "32x32", 1)]).manifest
    fields = row_fields(bucket, manifest)
    views = BatchBuffer(buffer_bytes(fields, 2), pin=False).lay_out(bucket, fields, 2)
    for raw in views.raw:
        raw[:] = 255  # NaN in every float
    views.pad(1)
    for name in ("latents", "masked_latents", "t5", "pooled", "noise", "weight"):
        tensor = getattr(views.batch, name)
        assert tensor[0].isnan().all() and (tensor[1] == 0).all(), name
    assert 0 < views.uniform[1] < 1
    assert views.batch.position[1] == 0


def test_tensors_of_a_buffer_begin_at_multiples_of_64_bytes_and_do_not_overlap(make_cache):
    bucket, manifest = Bucket(48, 64), make_cache([("a", "48x64", 1)]).manifest
    fields = row_fields(bucket, manifest)
    batch = BatchBuffer(buffer_bytes(fields, 3), pin=False).lay_out(bucket, fields, 3).batch
    tensors = sorted((getattr(batch, field.name) for field in fields), key=torch.Tensor.data_ptr)
    start = tensors[0].data_ptr()
    assert all((tensor.data_ptr() - start) % 64 == 0 for tensor in tensors)
    for one, other in pairwise(tensors):
        assert one.data_ptr() + one.nbytes <= other.data_ptr()
