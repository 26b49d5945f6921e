"""Entries of `data.datasets` for what a migration kept, and the folders that they need."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.migrate.names import repeats_of
from data.migrate.report import MigratedTriple

RANDOM_MASKS = {"random": {"brush": 0.6, "box": 0.2, "outpaint": 0.2}, "variants": 4}
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")


def part_by_kind(triples: Sequence[MigratedTriple]) -> list[MigratedTriple]:
    """Triples, in a folder for each kind if those that are kept are of several: a dataset has a source, or a mask of
    its own, for all of its pictures or for none."""
    if len({_kind(triple) for triple in triples if triple.kept}) < 2:
        return list(triples)
    return [
        replace(triple, name=f"{_kind(triple)}/{triple.name}") if triple.kept else triple  # which has no kind
        for triple in triples
    ]


def _kind(triple: MigratedTriple) -> str:
    if triple.hole_from == "none":
        return "without_mask"
    return "with_source" if triple.keeps_source else "with_mask"


def entries(triples: Sequence[MigratedTriple], out: Path, name: str) -> list[dict[str, Any]]:
    """One entry of `data.datasets` for each kind, and each folder of repeats, 10_name: its weight is how many pictures
    of it a pass of kohya's trainers sees. triples: those that are kept, as `part_by_kind` calls them."""
    by_kind: dict[str, list[MigratedTriple]] = defaultdict(list)
    for triple in triples:
        by_kind[_kind(triple)].append(triple)
    found = []
    for kind, of_kind in sorted(by_kind.items()):
        folder = kind if len(by_kind) > 1 else ""
        names = [triple.name.removeprefix(f"{folder}/") if folder else triple.name for triple in of_kind]
        if all(map(repeats_of, names)):
            repeated = {each.partition("/")[0]: repeats_of(each) or 1 for each in names}
            for below, repeats in sorted(repeated.items()):
                num = sum(each.startswith(f"{below}/") for each in names)
                found.append(_entry(kind, out, Path(folder, below), name) | {"weight": num * repeats})
        else:
            found.append(_entry(kind, out, Path(folder), name) | ({"weight": len(names)} if len(by_kind) > 1 else {}))
    if len(found) == 1:
        found[0].pop("weight", None)
    return _number_repeated_names(found)


def _number_repeated_names(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with names of their own: of folders such as 10_猫 and 10_狗 a name has only the 10."""
    names: dict[str, dict[str, Any]] = {}
    for entry in found:
        name, number = entry["name"], 1
        while name in names:
            number += 1
            name = f"{entry['name']}-{number}"
        names[name] = entry | {"name": name}
    return list(names.values())


def _entry(kind: str, out: Path, below: Path, name: str) -> dict[str, Any]:
    full_name = _NOT_IN_NAMES.sub("_", "-".join([name, *below.parts]))
    entry: dict[str, Any] = {"name": full_name, "target": str(out / "target" / below)}
    entry["mask"] = RANDOM_MASKS if kind == "without_mask" else str(out / "mask" / below)
    return entry | ({"source": str(out / "source" / below)} if kind == "with_source" else {})
