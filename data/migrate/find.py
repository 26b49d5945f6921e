"""Old triples by their names: what belongs together in up to three folders, or in one, as other trainers keep them."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from configs.errors import InputError, list_problems
from data.migrate.names import Partners, base_of, split_by_ends
from data.migrate.report import CaptionFrom, OldFolders
from data.migrate.role_folders import refuse_role_folders
from data.sources.caption_files import note_other_files, note_unused_texts, read_caption_file
from data.sources.folders import FoundPictures, find_pictures
from data.sources.near_names import NearNames
from data.sources.picture_file import PictureFile
from data.sources.problems import CAPTIONS, NAMES, Findings, Problem

_SHOWN = 5  # names without a partner, where there is none that has one
_CALLED = {"target": "target", "mask": "mask", "masked": "masked picture"}


@dataclass(frozen=True)
class OldTriple:
    """Pictures that belong together by their names.

    name: of the triple in the new folders.  caption: the text beside the target, or beside the masked picture, or None.
    no_masked: that there is no masked picture, where others have one; whether it is missed depends on what they are.
    problems: what its names alone show; a triple that has one is left out.
    """

    name: str
    target: PictureFile
    mask: PictureFile | None
    masked: PictureFile | None
    caption: str | None = None
    caption_from: CaptionFrom = "none"
    no_masked: Problem | None = None
    problems: tuple[Problem, ...] = ()


class Found(NamedTuple):
    """What the old folders hold. problems: of what belongs to no triple.  orphans: folder -> its pictures that belong
    to none, as they are called from there."""

    triples: list[OldTriple]
    problems: list[Problem]
    orphans: dict[str, list[str]]


class _Role(NamedTuple):
    """The pictures of one role, by name, and the folder that they are in."""

    folder: FoundPictures
    pictures: Mapping[str, PictureFile]


class _Match(NamedTuple):
    """What belongs together. name: of the triple.  files: role -> name in its folder."""

    name: str
    files: dict[str, str]


def find_in_folders(folders: OldFolders) -> Found:
    """The triples of folders, sorted by name. Raises InputError if a folder holds no picture, that of the targets
    has masks in a folder of their own, or the targets have not one name in common with the masks, or with the masked
    pictures."""
    findings = Findings()
    roles = _list(folders, findings)
    matches = list(_match(roles))
    _refuse_strangers(roles, matches)
    used = {role: {match.files.get(role) for match in matches} for role in roles}
    orphans = {role: sorted(roles[role].pictures.keys() - used[role]) for role in roles}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for role, names in orphans.items():
        _name_orphans(role, names, roles, matches, findings)
        if names:
            by_folder[str(roles[role].folder.folder)] += (_called(roles[role], name) for name in names)
    triples = _triples_of(matches, roles, orphans, findings)
    return Found(triples, [*findings.problems, *findings.notes], dict(by_folder))


def _list(folders: OldFolders, findings: Findings) -> dict[str, _Role]:
    """The pictures of each role that there is; of one that has no folder, those in the target's folder."""
    found = {
        role: find_pictures(folder, f"--{role} {folder}", f"--{role}", findings)
        for role, folder in folders.by_role.items()
    }
    roles = {role: _Role(each, _own_pictures(role, each, folders)) for role, each in found.items()}
    targets = roles["target"]
    refuse_role_folders(folders, targets.pictures)
    split = split_by_ends(targets.pictures, [role for role in ("mask", "masked") if role not in found])
    in_target = {
        role: _Role(targets.folder, {name: targets.pictures[name] for name in names}) for role, names in split.items()
    }
    return roles | in_target


def _own_pictures(role: str, found: FoundPictures, folders: OldFolders) -> dict[str, PictureFile]:
    """The pictures of a role's folder but those in the folder of another role, which may lie in it. Raises InputError
    if there are no others."""
    folder = found.folder.resolve()
    others = [other.resolve() for name, other in folders.by_role.items() if name != role]
    inside = [
        unicodedata.normalize("NFC", f"{o.relative_to(folder).as_posix()}/") for o in others if folder in o.parents
    ]
    pictures = {name: picture for name, picture in found.pictures.items() if not name.startswith(tuple(inside))}
    if not pictures:
        raise InputError(
            f"--{role} {found.folder} holds no picture but those in {' and '.join(inside)}, which another option "
            "names. Check the path."
        )
    return pictures


def _match(roles: Mapping[str, _Role]) -> Iterator[_Match]:
    """What belongs to each target; once for each of its masks if it has several."""
    partners = {role: Partners(each.pictures, role) for role, each in roles.items()}
    for target in sorted(roles["target"].pictures):
        names = [target, base_of(target, "target")]
        masks = partners["mask"].of(*names) if "mask" in partners else []
        for mask in masks or [""]:
            own = [mask] if len(masks) > 1 else []
            masked = partners["masked"].of(*own, *names)[:1] if "masked" in partners else []
            files = {"target": target} | ({"mask": mask} if mask else {}) | ({"masked": masked[0]} if masked else {})
            yield _Match(own[0] if own else _name_of(files), files)


def _name_of(files: Mapping[str, str]) -> str:
    """The target's name, without the end that says so if its partners have it without."""
    target, base = files["target"], base_of(files["target"], "target")
    bases = {base_of(name, role).casefold() for role, name in files.items() if role != "target"}
    return base if base.casefold() in bases else target


def _refuse_strangers(roles: Mapping[str, _Role], matches: Sequence[_Match]) -> None:
    said = []
    targets = roles["target"]
    for role in roles:
        if any(role in match.files for match in matches):
            continue
        near = NearNames(sorted(roles[role].pictures))
        names = [match.files["target"] for match in matches[:_SHOWN]]
        shown = ", ".join(_called(targets, name) + _hint(near.nearest(name), roles[role]) for name in names)
        said.append(
            f"--target {targets.folder.folder} and --{role} {roles[role].folder.folder} have not one name in common: "
            f"{shown}. Call what belongs together by the same name, up to the suffix or an end such as _mask."
        )
    if said:
        raise InputError(list_problems(said))


def _name_orphans(
    role: str, names: Sequence[str], roles: Mapping[str, _Role], matches: Sequence[_Match], findings: Findings
) -> None:
    """names: of pictures of a role that belong to no target."""
    near = NearNames(sorted(match.files["target"] for match in matches if role not in match.files))
    targets = roles["target"]
    for name in names:
        what = f"belongs to no target in {targets.folder.folder}{_hint(near.nearest(name), targets)}"
        findings.add(NAMES, roles[role].pictures[name], what, f"Add its target, or remove this {_CALLED[role]}.")


def _triples_of(
    matches: Sequence[_Match], roles: Mapping[str, _Role], orphans: Mapping[str, Sequence[str]], findings: Findings
) -> list[OldTriple]:
    near = {role: NearNames(names) for role, names in orphans.items()}

    def missing(role: str, match: _Match) -> Problem | None:
        if role not in roles or role in match.files:
            return None
        target = match.files["target"]
        hint = _hint(near[role].nearest(target), roles[role])
        what = f"no {_CALLED[role]} of the same name in {roles[role].folder.folder}{hint}"
        return Problem(NAMES, str(roles["target"].pictures[target]), what, "Add it, or leave the target out.")

    captions = _Captions(roles)
    targets_of = _targets_of(matches)
    triples: dict[str, OldTriple] = {}
    for match in matches:
        files = {role: roles[role].pictures[name] for role, name in match.files.items()}
        name, problems = match.name, _problems_of(match, roles, targets_of)
        if no_mask := missing("mask", match):
            problems.append(no_mask)
        if name in triples:
            what = f"would be called {name} as {triples[name].target} is"
            problems.append(Problem(NAMES, str(files["target"]), what, "Rename one of them."))
            name = f"{name}#{len(triples)}"
        caption, caption_from = captions.read(match, problems)
        pictures = (files["target"], files.get("mask"), files.get("masked"))
        no_masked = missing("masked", match)
        triples[name] = OldTriple(name, *pictures, caption, caption_from, no_masked, tuple(problems))
    captions.note_unread(findings)
    return sorted(triples.values(), key=lambda triple: triple.name)


def _targets_of(matches: Sequence[_Match]) -> dict[tuple[str, str], set[str]]:
    """(role, partner) -> the targets that it goes with."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for match in matches:
        for role in match.files.keys() - {"target"}:
            found[role, match.files[role]].add(match.files["target"])
    return found


def _problems_of(
    match: _Match, roles: Mapping[str, _Role], targets_of: Mapping[tuple[str, str], set[str]]
) -> list[Problem]:
    """What is wrong with the names of a triple: which of two files is meant, or whose a file is, cannot be told."""
    problems = []
    target = match.files["target"]
    for role, name in match.files.items():
        file = str(roles[role].pictures[name])
        if name in roles[role].folder.doubled:
            what = f"another file there has the same name but for its suffix, and either may be the {_CALLED[role]}"
            problems.append(Problem(NAMES, file, what, "Keep one of them."))
        others = targets_of[role, name] - {target} if role != "target" and name != target else set()
        if others:
            what = f"may belong to {target} or to {', '.join(sorted(others))}"
            problems.append(Problem(NAMES, file, what, "Call it like its target."))
    return problems


class _Captions:
    """The files of captions beside targets and masked pictures, and which of them were read."""

    def __init__(self, roles: Mapping[str, _Role]) -> None:
        self._roles = roles
        self._paths = {
            role: {name.casefold(): path for name, path in roles[role].folder.texts.items()}
            for role in ("target", "masked")
            if role in roles
        }
        self._used: set[str] = set()

    def read(self, match: _Match, problems: list[Problem]) -> tuple[str | None, CaptionFrom]:
        """A triple's caption, and what it stands beside. problems: takes that it cannot be read."""
        caption_from, path = self._find(match)
        if path is None:
            return None, "none"
        self._used.add(path)
        try:
            return read_caption_file(path), caption_from
        except InputError as error:
            problems.append(Problem.of(error, CAPTIONS, path))
            return None, "none"

    def _find(self, match: _Match) -> tuple[CaptionFrom, str | None]:
        target, masked = match.files["target"], match.files.get("masked")
        keys = [match.name, target, base_of(target, "target")]
        beside: list[tuple[CaptionFrom, list[str]]] = [("target", keys)]
        if masked is not None:
            beside.append(("masked", [masked, base_of(masked, "masked"), *keys]))
        for role, names in beside:
            for name in names:
                if path := self._paths[role].get(name.casefold()):
                    return role, path
        return "none", None

    def note_unread(self, findings: Findings) -> None:
        """Note what looks like a caption and was not read."""
        folders = {id(each.folder): each.folder for each in self._roles.values()}.values()
        known = {name for each in self._roles.values() for name in each.pictures}
        texts = {path: name for folder in folders for path, name in folder.texts_found.items()}
        note_unused_texts(texts, self._used, known, findings)
        note_other_files({path: name for folder in folders for path, name in folder.others.items()}, known, findings)


def _hint(nearest: str | None, role: _Role) -> str:
    return f"; the nearest is {_called(role, nearest)}" if nearest is not None else ""


def _called(role: _Role, name: str) -> str:
    """A picture as it is called from its folder."""
    return os.path.relpath(role.pictures[name].place, role.folder.folder)
