"""The fingerprint of the base of a run: of its transformer's content, in whatever files that lies."""

import json
from collections.abc import Iterator
from pathlib import Path

import xxhash

from configs.errors import InputError, os_errors_named
from data.encoders.model_folder import fingerprint, read_part_config

_PROBE_BYTES = 1 << 14
_STRIDE_BYTES = 1 << 26  # between the probes of a tensor: FLUX.1's large ones have two or three
_LONGEST_HEADER = 100 << 20  # safetensors' own limit


def base_fingerprint(model: Path) -> str:
    """The identity of a model's transformer, 32 hex digits: its config and, of every tensor, the name, dtype, shape and
    spread probes of its bytes. So it is the same however the tensors are dealt to files, and by whatever program.

    Another training differs in every tensor that it trained, so some 20 MiB of 24 GB are read. It is no check for
    damage.  Raises InputError if no transformer is there, or a file of it is broken.
    """
    part = model / "transformer"
    config = read_part_config(model, "transformer")
    told = {key: value for key, value in config.items() if value is not None and not key.startswith("_")}
    with os_errors_named(part, "read"):
        tensors = {tensor for path in part.glob("*.safetensors") for tensor in _hash_tensors(path)}
    if not tensors:
        raise InputError(f"{part}: no safetensors file is there; the model is not complete. Fetch the model again.")
    digest = xxhash.xxh3_128(json.dumps(told, sort_keys=True).encode())
    for tensor in sorted(tensors):
        digest.update(tensor.encode())
    return digest.hexdigest()


def is_base(model: Path, known: str) -> bool:
    """Whether a fingerprint that a checkpoint or an adapter keeps is that of a model: of its content or, as they were
    once made, of its files."""
    return known == base_fingerprint(model) or known == fingerprint(model / "transformer")


def _hash_tensors(path: Path) -> Iterator[str]:
    """A hash of each tensor of a file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                first, end = entry["data_offsets"]
                digest = xxhash.xxh3_128(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                for start in range(first, end, _STRIDE_BYTES):
                    file.seek(8 + length + start)
                    digest.update(file.read(min(_PROBE_BYTES, end - start)))
                yield digest.hexdigest()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: no whole safetensors file ({error}). Fetch the model again.") from error
