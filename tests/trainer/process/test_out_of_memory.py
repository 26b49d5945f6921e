import pytest
import torch

from trainer.process.out_of_memory import is_out_of_host_memory, is_out_of_memory


@pytest.mark.parametrize(
    "error, expected, of_host",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("NCCL Error 1: unhandled cuda error. Cuda failure 2 'out of memory'"), True, False),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            True,
            True,
        ),
        (MemoryError(), True, True),
        (RuntimeError("Connection closed by peer"), False, False),
        (ValueError("ran out of memory of what was meant"), False, False),
    ],
)
def test_what_says_that_memory_is_short(error, expected, of_host):
    assert is_out_of_memory(error) is expected
    assert is_out_of_host_memory(error) is of_host


def test_torch_says_it_of_the_host_in_those_words():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value) and is_out_of_host_memory(raised.value)
