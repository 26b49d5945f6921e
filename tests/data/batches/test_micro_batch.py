import numpy as np
import torch

from data.batches.micro_batch import BatchBuffer, BufferLease, row_fields, unpack_mask
from data.samples.geometry import Bucket


def test_a_packed_mask_is_unpacked(make_sample):
    masks = [make_sample(f"m{number}", Bucket(48, 64), text="").masks[0] for number in range(3)]
    packed = torch.from_numpy(np.packbits(np.stack(masks), axis=-1))
    unpacked = unpack_mask(packed)
    assert (unpacked.shape, unpacked.dtype) == ((3, 1, 48, 64), torch.float32)
    np.testing.assert_array_equal(unpacked[:, 0].bool().numpy(), np.stack(masks))
    assert unpacked.unique().tolist() == [0, 1]


def test_memory_is_taken_when_it_is_filled_and_the_last_used_first(make_cache):
    bucket, manifest = Bucket(32, 32), make_cache([("a", "32x32", 1)]).manifest
    fields = row_fields(bucket, manifest)
    slots = [BatchBuffer(sum(field.slot_bytes(2) for field in fields), pin=False) for _ in range(3)]
    free = list(slots)
    begun = [BufferLease(free, bucket, fields, 2) for _ in range(3)]
    assert free == slots, "nothing is filled yet"
    first = begun[0].rows().batch.latents.data_ptr()
    assert begun[0].rows().batch.latents.data_ptr() == first
    assert len(free) == 2
    begun[0].give_back()
    assert begun[1].rows().batch.latents.data_ptr() == first, "it is still in the processor's cache"
    assert begun[2].rows().batch.latents.data_ptr() != first
