"""The ends of names by which other trainers say what a picture is: a_mask, a-masklabel, a_M are masks of a, or a_G."""

import re
from collections import defaultdict
from collections.abc import Iterable

# Single letters count in capitals alone: photo_m is a photograph called so.
_ENDS = {
    "target": re.compile(r"(.+?)[._ -](?:(?i:target|gt|original)|G)"),
    "mask": re.compile(r"(.+?)[._ -](?:(?i:masks?|masklabel)|M)[._ -]?\d*"),
    "masked": re.compile(r"(.+?)[._ -](?:(?i:masked|condlabel|source|holed?)|F)"),
}
_REPEATS = re.compile(r"([1-9]\d{0,3})_.+")


def base_of(name: str, role: str) -> str:
    """A name without the end that says its role; itself if it has none."""
    folder, separator, last = name.rpartition("/")
    match = _ENDS[role].fullmatch(last)
    return f"{folder}{separator}{match[1]}" if match else name


def split_by_ends(names: Iterable[str], roles: Iterable[str]) -> dict[str, set[str]]:
    """The names of one folder by role. Those that end as masks do are masks if one of them has its target there too; so
    are masked pictures; all others are targets.

    roles: which of "mask" and "masked" may be among them.
    """
    all_names = set(names)
    targets = {key for name in all_names for key in (name, base_of(name, "target"))}
    found: dict[str, set[str]] = {}
    for role in roles:
        ending = {name: base_of(name, role) for name in all_names}
        if any(base != name and base in targets for name, base in ending.items()):
            found[role] = {name for name, base in ending.items() if base != name}
    return found | {"target": all_names.difference(*found.values())}


def repeats_of(name: str) -> int | None:
    """How often a trainer of kohya's line sees a picture in one pass: 10 for "10_cat/a"; None where its folder does not
    say."""
    folder, separator, _ = name.partition("/")
    match = _REPEATS.fullmatch(folder)
    return int(match[1]) if match and separator else None


class Partners:
    """Masks, or masked pictures, found by the name of their target: the same, or the same in another case, or the same
    without the end that says the role."""

    def __init__(self, names: Iterable[str], role: str) -> None:
        self._by_key: dict[str, set[str]] = defaultdict(set)
        for name in names:
            for key in (name, base_of(name, role)):
                self._by_key[key.casefold()].add(name)

    def of(self, *names: str) -> list[str]:
        """Those of a target that is called so, best first; of twins but for their case, one."""
        folded = [name.casefold() for name in names]
        found = {name for key in folded for name in self._by_key.get(key, ())}
        best_first = sorted(found, key=lambda name: (name not in names, name.casefold() not in folded, name))
        return list({name.casefold(): name for name in reversed(best_first)}.values())[::-1]
