"""What stands in the place of a caption that is dropped, and of a mask when the whole picture is to be painted."""

import xxhash
from safetensors.torch import load

from configs.errors import InputError
from data.cache.members import MASKED, Tensors, bytes_of, num_bytes, parse_header, sample_tensors, text_tensors
from data.cache.open_cache import Cache
from data.cache_layout import EMPTY_TEXT, blank_name
from data.samples.geometry import Bucket


def read_empty_text(cache: Cache) -> dict[str, memoryview]:
    """Bytes of the empty caption's tensors, by name. Raises InputError if the file is not what the manifest says."""
    return _read(cache, EMPTY_TEXT, text_tensors(cache.manifest))


def read_blank(cache: Cache, bucket: Bucket) -> dict[str, memoryview]:
    """Bytes of `masked_latents` and `mask` of a bucket's picture that is all hole. Raises InputError likewise."""
    masked = sample_tensors(bucket, cache.manifest)[MASKED]
    latents = _read(cache, blank_name(str(bucket)), {"masked_latents": masked["masked_latents"]})
    return latents | {"mask": memoryview(b"\xff" * num_bytes({"mask": masked["mask"]}))}


def _read(cache: Cache, name: str, expected: Tensors) -> dict[str, memoryview]:
    path = cache.folder / name
    try:
        data = path.read_bytes()
        _, entries = parse_header(data)
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        if found != expected:
            raise ValueError(f"it holds {found}, not {expected}")
        if xxhash.xxh3_128_hexdigest(data) != cache.manifest.files.get(name):
            raise ValueError("its checksum differs")
        tensors = load(data)
    except Exception as error:  # of files, and safetensors' own
        raise InputError(
            f"{path}: cannot be read ({error}). Delete it and run `fluxfill preprocess CONFIG` again; whole shards are "
            "kept."
        ) from error
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}
