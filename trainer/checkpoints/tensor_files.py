"""The canonical layout of a run's tensors: flat slices keyed by parameter name, whatever engine and ranks wrote them.

Each rank writes one safetensors file with the slices that it owns; index.json says which file holds which elements. A
reader asks for any range of any tensor, so a run saved by eight ranks of FSDP goes on under ZeRO on three.  No pickle.
    weight/<parameter>, <moment>/<parameter>    elements [start, stop) of the flattened parameter, fp32 or bf16
    ema/<parameter>                             likewise, fp32
    state/<layout-bound name>                                    8-bit moments and the like: read by the rank that wrote
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from configs.errors import InputError
from data.storage.safetensors_file import write_tensor_dict
from trainer.optimizers.state import dequantize, scale_of

INDEX = "index.json"
_RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a rank's file, and flush it to disk; returns its sha256. Tensors of a GPU are copied to the host one at a
    time."""
    # Those of large elements first, as the library does it: so each begins at a multiple of its element's size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    digest = hashlib.sha256()
    write_tensor_dict(path, ordered, digest=digest)
    return digest.hexdigest()


class Span(NamedTuple):
    """Elements [start, stop) of a parameter that a rank writes; of and at: inside its 8-bit tensor `of`, from element
    `at` on, instead of as a tensor of their own."""

    start: int
    stop: int
    of: str | None = None
    at: int = 0


def write_index(folder: Path, spans: Mapping[int, Mapping[str, Span]], sizes: Mapping[str, int]) -> None:
    """Write index.json from every rank's spans. sizes: parameter -> number of elements.

    Raises RuntimeError if the slices do not cover every tensor exactly once: such a checkpoint would load as garbage.
    """
    tensors: dict[str, list] = {}
    for rank, found in sorted(spans.items()):
        for name, span in found.items():
            inside = [] if span.of is None else [span.of, span.at]
            tensors.setdefault(name, []).append([span.start, span.stop, rank_file(rank), *inside])
    for name, parts in tensors.items():
        parts.sort()
        ends = [0, *(stop for _, stop, *_ in parts)]
        size = sizes[name.split("/", 1)[1]]
        if [start for start, *_ in parts] != ends[:-1] or ends[-1] != size:
            raise RuntimeError(f"{folder}: {name} has {size} elements, saved are {[part[:2] for part in parts]}")
    (folder / INDEX).write_text(json.dumps({"sizes": dict(sizes), "tensors": tensors}), encoding="utf-8")


class StateFiles:
    """A saved state, opened for reading: any range of any tensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.sizes: dict[str, int] = index["sizes"]
        self._tensors: dict[str, list] = index["tensors"]
        self._files: dict[str, safe_open] = {}
        self._dequantized = lru_cache(maxsize=2)(self._read_dequantized)  # one partition holds many parameters

    def names(self) -> list[str]:
        """All tensors: "<kind>/<parameter>"."""
        return sorted(self._tensors)

    def kinds(self) -> set[str]:
        """Kinds of tensors that there are of each parameter: "weight", the moments' names, perhaps "ema"."""
        return {name.split("/", 1)[0] for name in self._tensors}

    def _open(self, file: str) -> safe_open:
        if _RANK_FILE.fullmatch(file) is None:
            raise InputError(f"{self._folder / INDEX}: names {file!r}, which is no rank's file. Do not use it.")
        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt")
        return self._files[file]

    def read(self, kind: str, parameter: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a tensor, 1-D.  Raises InputError if the state does not hold it."""
        name = f"{kind}/{parameter}"
        if name not in self._tensors:
            raise InputError(f"{self._folder}: holds no {name}.")
        pieces = []
        for first, stop, file, *inside in self._tensors[name]:
            low, high = max(start, first), min(start + count, stop)
            if low < high and inside:
                of, at = inside
                pieces.append(self._dequantized(file, of, kind)[at + low - first : at + high - first])
            elif low < high:
                pieces.append(self._open(file).get_slice(name)[low - first : high - first])
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _read_dequantized(self, file: str, of: str, moment: str) -> Tensor:
        """One rank's 8-bit tensor of a moment, dequantized: fp32, flat."""
        opened = self._open(file)
        codes, scales = (opened.get_tensor(f"state/{of}//{key}") for key in (moment, scale_of(moment)))
        return dequantize(codes, scales, moment).view(-1)

    def read_bound(self, rank: int) -> dict[str, Tensor]:
        """The layout-bound tensors that a rank wrote."""
        file = self._open(rank_file(rank))
        names = [name for name in file.keys() if name.startswith("state/")]  # noqa: SIM118  (no dict: it has no iterator)
        return {name.removeprefix("state/"): file.get_tensor(name) for name in names}
