import pytest
import torch

from configs.errors import InputError
from data.encoders.device import HostCopy, on_device, raise_out_of_memory


def test_what_is_on_the_host_already_is_not_copied():
    tensor = torch.arange(6, dtype=torch.float32)
    copy = HostCopy(tensor)
    assert copy.num_bytes == 24
    assert copy.wait().data_ptr() == tensor.data_ptr()


@pytest.mark.gpu
def test_a_copy_from_the_gpu_is_complete_when_it_was_waited_for():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    tensor = torch.randn(1 << 20, device=device)
    copy = HostCopy(tensor)
    assert torch.equal(copy.wait(), tensor.cpu()) and copy.wait().is_pinned()
    with on_device(device):
        assert torch.cuda.current_device() == device.index


def test_a_full_device_says_what_to_set():
    with (
        pytest.raises(InputError, match=r"cuda:1 has no memory left to encode 4 pictures .*Lower data.encode_batch_s"),
        raise_out_of_memory(torch.device("cuda:1"), "encode 4 pictures at once"),
    ):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")


def test_another_error_stays_what_it_is():
    with pytest.raises(ValueError, match="shape"), raise_out_of_memory(torch.device("cpu"), "encode"):
        raise ValueError("shape")
