"""A model's folder: found, checked for its parts, and the fingerprints of its encoders."""

import json
from collections.abc import Collection
from pathlib import Path

import xxhash

from configs.errors import InputError

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

_KINDS = ("json", "safetensors", "txt", "model")  # of a part's files: pickles and other programs' weights are none

_PROBE_BYTES = 1 << 16
_PROBES = 64


def find_model(base: str, *, download: bool = True) -> Path:
    """The folder of a model in diffusers' layout: a folder as given, or the local copy of a hub repository.

    download: fetch what the local copy lacks.
    Raises InputError, naming the part, if something a run needs is missing.
    """
    folder = Path(base).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            raise InputError(
                f"model.base {base}: is a file. `fluxfill fetch {base} --out DIR` makes a folder in diffusers' layout "
                "of it; point model.base at that."
            )
        if not is_hub_id(base):
            seen_from = "" if folder.is_absolute() else f", seen from {Path.cwd()}"
            raise InputError(
                f"model.base {base}: no such folder{seen_from}. Give a folder in diffusers' layout (model_index.json "
                f"beside {', '.join(PARTS)}) or a hub id such as black-forest-labs/FLUX.1-Fill-dev."
            )
        folder = _local_copy(base, download=download)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if not (folder / "model_index.json").is_file():
        missing.insert(0, "model_index.json")
    if missing:
        raise InputError(
            f"model.base {base}: {folder} lacks {', '.join(missing)}. A FLUX.1 model in diffusers' layout has "
            f"model_index.json and the folders {', '.join(PARTS)}; fetch it again, or point model.base elsewhere."
        )
    return folder


def is_hub_id(base: str) -> bool:
    """Whether model.base may name a hub repository where no folder is called so: "owner/name"."""
    path = Path(base).expanduser()
    is_file = path.suffix in {".safetensors", ".ckpt", ".pt"}
    return not path.is_dir() and not is_file and not path.is_absolute() and base.count("/") == 1


def hub_patterns(without_weights: Collection[str] = ()) -> list[str]:
    """Patterns of the files of a hub repository that a model needs; of some parts the config alone.

    The hub also holds BFL's single file, as large as the transformer again: it is in no part's folder.
    """
    whole = [f"{part}/*.{kind}" for part in PARTS if part not in without_weights for kind in _KINDS]
    return ["model_index.json", *whole, *(f"{part}/config.json" for part in without_weights)]


def _local_copy(base: str, *, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=hub_patterns(), local_files_only=not download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"model.base {base}: neither a folder here nor to be had from the hub ({type(error).__name__}). Run "
            f"`fluxfill fetch {base}` where there is a network: it says what is missing. A gated model "
            "wants its licence accepted on the hub's page and `hf auth login` "
            "(docs/troubleshooting.md#the-model-cannot-be-fetched)."
        ) from error


def read_part_config(folder: Path, part: str, name: str = "config.json") -> dict:
    """The JSON config of one part. Raises InputError if it is missing or no JSON."""
    path = folder / part / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; the model folder is not complete. Fetch the model again.") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}). Fetch the model again.") from error


def read_part_number(folder: Path, part: str, key: str) -> float:
    """One number of a part's config.json. Raises InputError if it is not there: the model is not a FLUX.1."""
    config = read_part_config(folder, part)
    number = config.get(key) if isinstance(config, dict) else None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise InputError(
            f"{folder / part / 'config.json'}: {key} is {number!r}, but FLUX.1 has a number there. Point "
            "model.base at a FLUX.1 model."
        )
    return number


def fingerprint(part: Path) -> str:
    """A part's identity, 32 hex digits: its small files, 64 spread probes and the size of each large one.

    Another training of the same network differs in every probe, so nine gigabytes of T5 need not be read. It is no
    check for damage.  Raises InputError if the folder is empty.
    """
    digest = xxhash.xxh3_128()
    files = sorted(path for path in part.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise InputError(f"{part}: an empty folder; the model is not complete. Fetch the model again.")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(part).as_posix()}:{size};".encode())
        with path.open("rb") as file:
            if size <= 2 * _PROBES * _PROBE_BYTES:
                digest.update(file.read())
                continue
            for probe in range(_PROBES):
                file.seek((size - _PROBE_BYTES) * probe // (_PROBES - 1))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()


def encoder_fingerprints(folder: Path) -> dict[str, str]:
    """Part name -> fingerprint, for all that shapes a cached tensor."""
    return {part: fingerprint(folder / part) for part in ENCODERS}
