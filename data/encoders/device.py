"""A device whose memory is full, told so that whoever meets it knows what to set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from configs.errors import InputError


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
        "data.encoder_devices names GPUs of their own."
    )
