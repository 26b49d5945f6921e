import numpy as np
import torch

from data.batches.micro_batch import unpack_mask
from data.samples.geometry import Bucket


def test_a_packed_mask_is_unpacked(make_sample):
    masks = [make_sample(f"m{number}", Bucket(48, 64), text="").masks[0] for number in range(3)]
    packed = torch.from_numpy(np.packbits(np.stack(masks), axis=-1))
    unpacked = unpack_mask(packed)
    assert (unpacked.shape, unpacked.dtype) == ((3, 1, 48, 64), torch.float32)
    np.testing.assert_array_equal(unpacked[:, 0].bool().numpy(), np.stack(masks))
    assert unpacked.unique().tolist() == [0, 1]
