"""Settings of torch's memory allocator on GPUs, by environment variables: torch reads them once, at its first use."""

import sys
from collections.abc import Mapping

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's, and its older name


def allocator_settings(inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables to set on top of those inherited: segments that grow.

    Pictures of many sizes leave blocks of many sizes in the allocator's cache, of which none fits the next: that much
    memory is reserved and of no use. Nothing where the user has settings of their own, and outside Linux, where torch
    cannot do it.
    """
    if sys.platform != "linux" or any(name in inherited for name in _NAMES):
        return {}
    return {_NAMES[0]: "expandable_segments:True"}
