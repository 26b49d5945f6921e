"""Out of memory: which errors say so.

Imports nothing heavy: torch's own error is known by its name.
"""

_OF_HOST = "can't allocate memory"
_WORDS = ("out of memory", _OF_HOST, "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left: torch's own, and what CUDA, cuBLAS and
    NCCL say where torch is not asked."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether an error says so of the host: Python's own, and torch's of a tensor on the CPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OF_HOST in str(error))
