"""WebDataset tars of pictures: which they are, and which of their members make an item."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.urls import is_url, shown
from data.sources.items import HALF_A_CHARACTER, Item, decode_text, is_utf8
from data.sources.picture_file import PictureFile
from data.sources.problems import CAPTIONS, NAMES, Findings
from data.storage.remote_files import check_url
from data.storage.tar_members import Member, read_members

_LONGEST_CAPTION = 1 << 20  # bytes
# As WebDataset splits names: "a/b.c/cat.target.png" is target.png of a/b.c/cat.
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")


def expand_tars(patterns: Sequence[str], dataset: str) -> list[str]:
    """Every tar that the patterns of a dataset name: photos-{000..127}.tar is 128 of them.

    Raises InputError if braces do not close, a URL may not be opened, or two tars have one name: a sample is named by
    its tar and its key.
    """
    tars: list[str] = []
    for pattern in patterns:
        try:
            tars += braceexpand(pattern)
        except ValueError as error:
            raise InputError(
                f"dataset {dataset}: tars {shown(pattern)}: {error}. Correct data.datasets.*.tars."
            ) from error
    places: dict[str, str] = {}
    for tar in tars:
        if is_url(tar):
            check_url(tar, f"dataset {dataset}: tar")
        if (name := tar_name(tar)) in places:
            raise InputError(
                f"dataset {dataset}: {shown(places[name])} and {shown(tar)} have the same name, by which their samples "
                "are called. Rename one, or make two datasets of them."
            )
        places[name] = tar
    return tars


def tar_name(tar: str) -> str:
    """What the samples of a tar are called by: its file's name, without suffixes or a URL's query."""
    return tar.partition("?")[0].rpartition("/")[2].partition(".")[0]


def list_tar(tar: str, copy: Path, dataset: DatasetConfig, findings: Findings, *, masks: bool) -> list[Item]:
    """The items of one tar, in its order. copy: the file to read, `tar` itself if it is local. masks: whether they are
    in it.  findings: takes every sample without target, mask or source.

    Raises InputError for whatever `read_members` refuses.
    """
    samples: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in read_members(copy, shown(tar)):
        match = _KEY_AND_SUFFIX.match(member.name)
        if not match or member.name.rpartition("/")[2].startswith("__"):
            continue  # no sample's; WebDataset too passes over what is hidden, has no suffix or begins with __
        if not is_utf8(member.name):
            findings.add(NAMES, shown(tar), f"the name of the member {member.name!a} is not UTF-8", "Rename it.")
            continue
        key, suffix = match[1], match[2].lower()
        if suffix in samples[key]:
            cure = "Write the tar with one sample of that name."
            findings.add(NAMES, shown(tar), f"{key}.{suffix} is there twice", cure)
        samples[key][suffix] = member
    names = dataset.members
    wanted = [("target", names.target)] + ([("mask", names.mask)] if masks else [])
    wanted += [("source", names.source)] if names.source else []
    items = []
    for key, members in samples.items():
        found = {role: _first(members, suffixes) for role, suffixes in wanted}
        lacking = [role for role, member in found.items() if member is None]
        for role in lacking:
            findings.add(
                NAMES,
                shown(tar),
                f"sample {key} has no {role} ({', '.join(dict(wanted)[role])}), but {', '.join(sorted(members))}",
                f"Add it, or correct data.datasets.*.members.{role}.",
            )
        if not lacking:
            copied = "" if tar == str(copy) else str(copy)
            pictures = {
                role: PictureFile(tar, member.offset, member.size, member.name, copied, member.offset)
                for role, member in found.items()
                if member is not None
            }
            caption = None
            try:
                caption = _read_caption(tar, copy, _first(members, names.caption))
            except InputError as error:
                findings.add_error(error, CAPTIONS, shown(tar))
            items.append(
                Item(
                    f"{tar_name(tar)}/{key}", pictures["target"], pictures.get("mask"), pictures.get("source"), caption
                )
            )
    if not items and not findings.problems:
        raise InputError(f"{shown(tar)}: holds no sample. Remove it from data.datasets.*.tars.")
    return items


def _first(members: dict[str, Member], suffixes: Sequence[str]) -> Member | None:
    return next((members[suffix] for suffix in suffixes if suffix in members), None)


def _read_caption(tar: str, copy: Path, member: Member | None) -> str | None:
    """A text, or the entry `caption` of a JSON object."""
    if member is None:
        return None
    if member.size > _LONGEST_CAPTION:
        raise InputError(
            f"{shown(tar)}: {member.name}: {member.size} bytes are no caption, of which the longest has "
            f"{_LONGEST_CAPTION >> 20} MiB. Shorten or remove it."
        )
    data = PictureFile(str(copy), member.offset, member.size, member.name).read(_LONGEST_CAPTION).data
    text = decode_text(data, f"{shown(tar)}: {member.name}")
    if not member.name.lower().endswith(".json"):
        return text
    try:
        caption = json.loads(text).get("caption")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{shown(tar)}: {member.name}: no JSON object ({error}). Mend or remove it.") from error
    if not isinstance(caption, str | None):
        raise InputError(f"{shown(tar)}: {member.name}: its caption is no text. Mend or remove it.")
    if caption is not None and not is_utf8(caption):
        raise InputError(f"{shown(tar)}: {member.name}: its caption {HALF_A_CHARACTER}. Mend or remove it.")
    return caption
