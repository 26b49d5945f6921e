"""safetensors files written and read one tensor at a time: a model of any size needs the memory of its largest tensor.

safetensors' own save_file wants all of a file's tensors at once, and writes metadata in another order every time.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ReadTensor = Callable[[str], Tensor]  # a tensor by its name

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


class TensorSpec(NamedTuple):
    """What a tensor will be, before there is one."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: ReadTensor,
    metadata: Mapping[str, str] | None = None,
    *,
    digest: "hashlib._Hash | None" = None,
) -> None:
    """Write a safetensors file, its tensors in the order of `specs`, and flush it to disk; the same bytes for the same
    tensors.

    digest: given all bytes of the file as they are written.  Raises RuntimeError if `read` gives another dtype or shape
    than was said.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(sorted((metadata or {}).items()))}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            if digest is not None:
                digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            tensor = read(name).detach().to("cpu")
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, tuple(spec.shape)):
                raise RuntimeError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, not {spec}")
            write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_tensor_dict(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    digest: "hashlib._Hash | None" = None,
) -> None:
    """`write_tensors` of tensors at hand."""
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(path, specs, tensors.__getitem__, metadata, digest=digest)


class TensorFiles:
    """The tensors of one or several safetensors files, read by name.  Raises OSError or ValueError if one is broken."""

    def __init__(self, *files: Path) -> None:
        self._opened: dict[str, safe_open] = {}
        for path in files:
            try:
                opened = safe_open(path, "pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: no whole safetensors file ({error})") from error
            self._opened |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> list[str]:
        return list(self._opened)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._opened[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError if it is one that no tensor of ours has."""
        stored = self._opened[name].get_slice(name).get_dtype()
        if stored not in _BY_NAME:
            raise ValueError(f"{name} is stored as {stored}, which is not read")
        return _BY_NAME[stored]

    def read(self, name: str) -> Tensor:
        return self._opened[name].get_tensor(name)
