"""Every name in a cache folder, and who may delete what there.

    manifest.json, shards.npz     what was cached, and the list of shards.  shards.npz is written first. manifest.json
                                  is deleted before anything changes and written last: a cache that has it is complete
    empty_text.safetensors        text of a dropped caption.  Replaced by preprocessing
    blank_<bucket>.safetensors    masked latents of a picture that is all hole.  Deleted if no shard has the bucket
    shards/<dataset>/             tars.  Deleted if no plan names them; moved away by repair
    index/<dataset>/              their indexes, which go where their tars go; in a cache of format 1 beside the tars
    validation/                   pixels to watch a run by.  Replaced as a folder by the worker that completes the cache
    owner.json                    the run that the cache was made for, and its datasets.  Replaced by preprocessing
    scan/<dataset>/               what was found out about pictures.  Deleted by a scan that had no use for it
    copies/                       of remote pictures.  Deleted by the worker that completes the cache,
                                  unless a file of theirs says that an online run reads them
    quarantine/, quarantine.jsonl what repair found bad, and why.  Only its user deletes it
    problems.txt                  all that was wrong with the pictures, if too long to show.  Replaced by the next scan
    crew/                         who is at work on what.  Deleted by the last worker to leave
    *.<8 hex digits>.part         half written.  Deleted by whoever takes over a dead worker's work

Whatever has another name is the user's: nothing of ours deletes it.
"""

import re
from pathlib import Path

MANIFEST, SHARD_TABLE = "manifest.json", "shards.npz"
EMPTY_TEXT = "empty_text.safetensors"
PROBLEMS, OWNER = "problems.txt", "owner.json"
QUARANTINE, QUARANTINE_LIST = "quarantine", "quarantine.jsonl"
SHARDS, INDEX, VALIDATION, SCAN, COPIES, CREW = OWN_FOLDERS = (
    "shards",
    "index",
    "validation",
    "scan",
    "copies",
    "crew",
)

_PART = r"\.[0-9a-f]{8}\.part"
_SHARD_FILE = re.compile(rf"(holdout-)?\d+x\d+(-[0-9a-f]{{16}})?-\d{{6,}}\.(tar|index)({_PART})?")
_BESIDE_MANIFEST = re.compile(rf"blank_\d+x\d+\.safetensors|.+{_PART}")


def full_mask_name(bucket: str) -> str:
    """The file of a bucket's full-mask latents."""
    return f"blank_{bucket}.safetensors"


def index_path(tar: Path, format_version: int) -> Path:
    """The file of a shard's index: below index/ as its tar is below shards/, where other programs take every file for
    a shard. In a cache of format 1, and of a tar that lies in no cache, beside it."""
    if format_version == 1 or tar.parts[-3:-2] != (SHARDS,):
        return tar.with_suffix(".index")
    return Path(*tar.parts[:-3], INDEX, tar.parts[-2], f"{tar.stem}.index")


def tars_of(cache: Path, dataset: str) -> list[Path]:
    """The tars of a dataset's shards that some plan named."""
    found = (cache / SHARDS / dataset).glob("*.tar")
    return [path for path in found if _SHARD_FILE.fullmatch(path.name) and path.is_file()]


def files_of_plans(cache: Path) -> list[Path]:
    """The files in a cache that some plan named, and what is left of half-written ones: those no plan names any more
    may be deleted."""
    below = [*(cache / SHARDS).glob("*/*"), *(cache / INDEX).glob("*/*")]
    of_shards = [path for path in below if _SHARD_FILE.fullmatch(path.name)]
    beside = [path for path in cache.glob("*") if _BESIDE_MANIFEST.fullmatch(path.name)]
    return [path for path in of_shards + beside if path.is_file()]
