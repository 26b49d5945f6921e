"""GPUs: which one a thread means, copies to the host's memory, and the message when there is no memory left."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from configs.errors import InputError


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one of this thread: allocating pinned memory or waiting for an event would else open a
    context of half a GiB on the machine's first GPU, in every process."""
    return torch.cuda.device(device)


class HostCopy:
    """A tensor on its way to the host's memory: the copy is queued at once, `wait` gives it when it is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived = None
        if not tensor.is_cuda:
            self._tensor = tensor
            return
        self._device = tensor.device
        with on_device(self._device):
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def num_bytes(self) -> int:
        return self._tensor.nbytes

    def wait(self) -> Tensor:
        if self._arrived is not None:
            with on_device(self._device):
                self._arrived.synchronize()
        return self._tensor


@contextmanager
def raise_out_of_memory(device: torch.device, doing: str) -> Iterator[None]:
    """Raises InputError where the device has no memory for what is done in the block: "encode 4 pictures at once"."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise no_memory(device, doing, error) from error


def no_memory(device: torch.device, doing: str, error: torch.OutOfMemoryError) -> InputError:
    """What to raise of it."""
    return InputError(
        f"{device} has no memory left to {doing} ({error}). Lower data.encode_batch_size, or place the encoders "
        "elsewhere: data.encoders sets the device of each (cuda:1, or cpu) and T5's precision; for data.mode online, "
        "data.encoder_devices names GPUs of their own (docs/troubleshooting.md#out-of-memory)."
    )
