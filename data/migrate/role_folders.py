"""Folders that say by their name what their pictures are: old/target, old/mask, old/masked, where `old` was given."""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from configs.errors import InputError
from data.migrate.names import base_of
from data.migrate.report import OldFolders
from data.sources.picture_file import PictureFile

_SEPARATOR, _PICTURES = "[._ -]?", "images?|imgs?|pictures?|photos?"
_WORDS = {
    "target": f"targets?|gts?|ground{_SEPARATOR}truths?|originals?|{_PICTURES}",
    "mask": f"masks?(?:{_SEPARATOR}labels?)?",
    "masked": "masked|holed|sources?|srcs?|cond(?:itioning|labels?)?|controls?",
}
_CALLED = {
    role: re.compile(f"(?:{words})(?:{_SEPARATOR}(?:{_PICTURES}))?(?:{_SEPARATOR}(?:dir|folder))?", re.IGNORECASE)
    for role, words in _WORDS.items()
}


class _Pictures(NamedTuple):
    """Pictures of a folder. stems: what they are called from there, without the ends that say a role."""

    folder: Path
    stems: frozenset[str]

    def go_with(self, others: "_Pictures") -> bool:
        """Whether most of them are called like others: some single ones may be by chance."""
        return 2 * len(self.stems & others.stems) >= len(self.stems)


def refuse_role_folders(folders: OldFolders, targets: Mapping[str, PictureFile]) -> None:
    """Raise InputError if the targets' folder holds masks or masked pictures in folders of their own, whose pictures
    would be learned as targets. targets: the pictures below it, by their names from there."""
    several = list(_find_role_folders(targets))
    for found in several[:1]:
        given = folders.by_role | found | ({} if "target" in found else {"target": Path("DIR")})
        options = " ".join(f"--{role} {shlex.quote(str(given[role]))}" for role in _WORDS if role in given)
        inside = " and ".join(str(folder) for role, folder in found.items() if role != "target")
        more = len(several) - 1
        others = f" (and what {more} more place{'s hold' if more > 1 else ' holds'}, by itself)" if more else ""
        raise InputError(
            f"--target {folders.target} holds masks or masked pictures in {inside}: they have the names of other "
            f"pictures there, and would be learned as targets too. Give each folder{others}: {options}"
        )


def _find_role_folders(pictures: Mapping[str, PictureFile]) -> Iterator[dict[str, Path]]:
    """Role -> folder, wherever some lie side by side (or the others in that of the targets) and hold pictures of the
    same names."""
    named: dict[tuple[str, ...], dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    plain: dict[tuple[str, ...], list[str]] = defaultdict(list)  # in a folder, and in none of a role below it
    for name in pictures:
        *above, _ = name.split("/")
        last = -1
        for at, part in enumerate(above):  # an outer folder may be called images, too
            if role := _role_of(part):
                named[tuple(above[:at])][role, part].append(name)
                last = at
        for depth in range(last + 1, len(above) + 1):
            plain[tuple(above[:depth])].append(name)
    for prefix, groups in sorted(named.items()):
        by_role: dict[str, list[_Pictures]] = defaultdict(list)
        for (role, _), names in groups.items():
            by_role[role].append(_pictures_of(names, len(prefix) + 1, role, pictures))
        if beside := plain.get(prefix):
            by_role["target"].append(_pictures_of(beside, len(prefix), "target", pictures))
        if found := _choose(by_role):
            yield found


def _choose(by_role: Mapping[str, list[_Pictures]]) -> dict[str, Path]:
    """Role -> folder of those that go together; empty if none do. By names alone a mask may be one to be worn, so it
    takes a folder of targets, or masks and masked pictures."""
    masks, masked = by_role.get("mask", []), by_role.get("masked", [])
    for target in by_role.get("target", []):
        found = {
            role: each.folder
            for role, several in (("mask", masks), ("masked", masked))
            for each in several
            if each.go_with(target)
        }
        if found:
            return {"target": target.folder} | found
    pairs = ((mask, other) for mask in masks for other in masked if other.go_with(mask))
    return next(({"mask": mask.folder, "masked": other.folder} for mask, other in pairs), {})


def _pictures_of(names: list[str], depth: int, role: str, pictures: Mapping[str, PictureFile]) -> _Pictures:
    """depth: of their folder, below the one that they are called from."""
    below = names[0].count("/") - depth
    stems = frozenset(base_of(name.split("/", depth)[depth], role).casefold() for name in names)
    return _Pictures(Path(pictures[names[0]].place).parents[below], stems)


def _role_of(folder: str) -> str | None:
    return next((role for role, words in _CALLED.items() if words.fullmatch(folder)), None)
