"""WebDataset tars of pictures: which they are, and which of their members make an item."""

import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from glob import escape as glob_escape
from glob import glob
from pathlib import Path

from braceexpand import braceexpand

from configs.dataset_schema import DatasetConfig, MembersConfig
from configs.errors import InputError
from configs.urls import is_url, shown
from data.sources.items import HALF_A_CHARACTER, Item, decode_text, is_utf8
from data.sources.picture_file import PictureFile
from data.sources.problems import CAPTIONS, NAMES, Findings
from data.sources.walk import OF_SYSTEMS
from data.storage.remote_files import check_url
from data.storage.tar_members import Member, read_members

_LONGEST_CAPTION = 1 << 20  # bytes
_ONE_OF_SEVERAL = re.compile(r"(mask[._-]?\d+)\.(?:png|webp|jpe?g)")
# As WebDataset splits names: "a/b.c/cat.target.png" is target.png of a/b.c/cat.
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")


def expand_tars(patterns: Sequence[str], dataset: str) -> list[str]:
    """Every tar that the patterns of a dataset name: photos-{000..127}.tar is 128 of them, photos-*.tar those that are
    there, and a folder's name all in it.

    Raises InputError if braces do not close, a pattern matches none, a URL may not be opened, or two tars have one
    name: a sample is named by its tar and its key.
    """
    tars: list[str] = []
    for pattern in patterns:
        try:
            for place in braceexpand(pattern):
                tars += _find_tars(place, dataset)
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


def _find_tars(place: str, dataset: str) -> list[str]:
    """The tars of a place without braces: a tar, a folder of tars, or a pattern with * or ?."""
    is_folder = not is_url(place) and os.path.isdir(place)
    if is_url(place) and "*" in place.partition("?")[0]:
        raise InputError(
            f"dataset {dataset}: tars {shown(place)}: a server is not asked which files it has. Write their numbers in "
            "braces: photos-{000000..000127}.tar."
        )
    if is_url(place) or not (is_folder or re.search(r"[*?[]", place)) or os.path.isfile(place):
        return [place]
    found = sorted(glob(os.path.join(glob_escape(place), "*.tar") if is_folder else place))
    if not found:
        raise InputError(f"dataset {dataset}: tars {place}: no .tar is there. Correct data.datasets.*.tars.")
    return found


def tar_name(tar: str) -> str:
    """What the samples of a tar are called by: its file's name, without suffixes or a URL's query."""
    return tar.partition("?")[0].rpartition("/")[2].partition(".")[0]


def list_tar(tar: str, copy: Path, dataset: DatasetConfig, findings: Findings, *, masks: bool) -> list[Item]:
    """The items of one tar, in its order. copy: the file to read, `tar` itself if it is local. masks: whether they are
    in it.  findings: takes every sample without target, mask or source.

    Raises InputError for whatever `read_members` refuses.
    """
    names = dataset.members
    wanted = {"target": names.target} | ({"mask": names.mask} if masks else {})
    wanted |= {"source": names.source} if names.source else {}
    items = []
    without_caption: set[str] = set()  # what else their samples hold
    for key, members in _group_by_key(tar, copy, findings).items():
        found = {role: _first(members, suffixes) for role, suffixes in wanted.items()}
        several = _several_masks(members) if masks and names.mask == MembersConfig().mask else {}
        lacking = [role for role, member in found.items() if member is None and not (role == "mask" and several)]
        for role in lacking:
            findings.add(
                NAMES,
                shown(tar),
                f"sample {key} has no {role} ({', '.join(wanted[role])}), but {', '.join(sorted(members))}",
                f"Add it, or correct data.datasets.*.members.{role}.",
            )
        if lacking:
            continue
        try:
            caption = _read_caption(tar, copy, members, names.caption)
        except InputError as error:
            caption = None
            findings.add_error(error, CAPTIONS, shown(tar))
        if caption is None:
            without_caption |= members.keys()
        pictures = {role: _picture(tar, copy, member) for role, member in found.items() if member is not None}
        target, source = pictures["target"], pictures.get("source")
        stored_key = _KEY_AND_SUFFIX.sub(r"\1", target.member)
        name = f"{tar_name(tar)}/{stored_key}"
        if "mask" in pictures or not masks:
            items.append(Item(name, target, pictures.get("mask"), source, caption))
        for which, member in several.items():
            items.append(Item(f"{name}.{which}", target, _picture(tar, copy, member), source, caption))
    if may_be := sorted(without_caption & {"caption", "text", "prompt", "cls", "json", "label"}):
        what = f"samples without a caption ({', '.join(names.caption)}) have {', '.join(may_be)}"
        cure = "If those hold captions, name them in data.datasets.*.members.caption; of JSON, caption or text is read."
        findings.note(CAPTIONS, shown(tar), what, cure)
    if not items and not findings.problems:
        raise InputError(f"{shown(tar)}: holds no sample. Remove it from data.datasets.*.tars.")
    return items


def _group_by_key(tar: str, copy: Path, findings: Findings) -> dict[str, dict[str, Member]]:
    """Key, in Unicode's NFC -> suffix -> member. findings: takes names that are not UTF-8, or there twice."""
    samples: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in read_members(copy, shown(tar)):
        match = _KEY_AND_SUFFIX.match(member.name)
        folders, _, file = member.name.rpartition("/")
        if not match or file.startswith("__") or not OF_SYSTEMS.isdisjoint(folders.split("/")):
            continue  # no sample's; WebDataset too passes over what is hidden, has no suffix or begins with __
        if not is_utf8(member.name):
            findings.add(NAMES, shown(tar), f"the name of the member {member.name!a} is not UTF-8", "Rename it.")
            continue
        key, suffix = unicodedata.normalize("NFC", match[1]), match[2].lower()
        if suffix in samples[key]:
            cure = "Write the tar with one sample of that name."
            findings.add(NAMES, shown(tar), f"{key}.{suffix} is there twice", cure)
        samples[key][suffix] = member
    return samples


def _first(members: dict[str, Member], suffixes: Sequence[str]) -> Member | None:
    return next((members[suffix] for suffix in suffixes if suffix in members), None)


def _several_masks(members: dict[str, Member]) -> dict[str, Member]:
    """ "mask0" -> member, of mask0.png, mask_01.png and so on, in their order."""
    found = {match[1]: suffix for suffix in sorted(members) if (match := _ONE_OF_SEVERAL.fullmatch(suffix))}
    return {which: members[suffix] for which, suffix in found.items()}


def _picture(tar: str, copy: Path, member: Member) -> PictureFile:
    copied = "" if tar == str(copy) else str(copy)
    return PictureFile(tar, member.offset, member.size, member.name, copied, member.offset)


def _read_caption(tar: str, copy: Path, members: dict[str, Member], suffixes: Sequence[str]) -> str | None:
    """The first text that is not empty; of a JSON object the entry `caption`, or `text`."""
    texts = (_read_text(tar, copy, members[suffix]) for suffix in suffixes if suffix in members)
    return next((text for text in texts if text and text.strip()), None)


def _read_text(tar: str, copy: Path, member: Member) -> str | None:
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
        entries = json.loads(text)
        caption = entries.get("caption")
        if caption is None and isinstance(entries.get("text"), str):
            caption = entries["text"]
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{shown(tar)}: {member.name}: no JSON object ({error}). Mend or remove it.") from error
    if not isinstance(caption, str | None):
        raise InputError(f"{shown(tar)}: {member.name}: its caption is no text. Mend or remove it.")
    if caption is not None and not is_utf8(caption):
        raise InputError(f"{shown(tar)}: {member.name}: its caption {HALF_A_CHARACTER}. Mend or remove it.")
    return caption
