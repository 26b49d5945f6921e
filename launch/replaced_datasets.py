"""What the datasets of a migration take over from those of a config whose place they take."""

from collections.abc import Collection, Mapping, Sequence
from math import isclose
from typing import Any

from configs.edit_yaml import in_place_of
from configs.legacy.left_open import uncounted_weights
from configs.yaml_text import parse_yaml

_OWN = ("name", "weight", "target", "source", "mask", "tars", "members", "table", "columns")


def take_over(
    entries: Sequence[dict[str, Any]], pictures: Sequence[int], text: str, replaced: Collection[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries with what stays of the datasets that they replace, and sentences for the user on their weights.

    entries, pictures: of each new dataset its entry, and how many pictures it has.  text: of the config, which has the
    datasets named in `replaced`.  Together the new ones have the share in the mix that the old ones had.
    """
    document: Any = parse_yaml(text).value
    datasets: list[dict[str, Any]] = document["data"]["datasets"]
    old = [each for each in datasets if each["name"] in replaced]
    if not old:
        return list(entries), []
    known = {key: value for key, value in old[0].items() if all(key in one and one[key] == value for one in old)}
    new, notes = [], []
    for entry in entries:
        merged = in_place_of(known, entry)
        new.append({key: merged[key] for key in entry} | {key: merged[key] for key in merged if key not in _OWN})
    names = {entry["name"] for entry in entries}
    gone = [one for one in old if one["name"] not in names]
    lost = {key for one in gone for key, value in one.items() if key not in known and _stays(key, value)}
    for key in sorted(lost):
        who = ", ".join(one["name"] for one in old)
        notes.append(f"{key}: not taken over, as {who} differ in it. Give it to the new datasets by hand.")
    weights, why = _weights(entries, pictures, old, is_alone=len(old) == len(datasets), text=text)
    for entry, weight in zip(new, weights, strict=True):
        if weight is not None:
            entry["weight"] = weight
    return new, notes + why


def _stays(key: str, value: Any) -> bool:
    """Whether a key of a dataset says what is made of its pictures, wherever they are, weights aside."""
    return key not in _OWN or (key == "mask" and isinstance(value, dict) and "dilate" in value)


def _weights(
    entries: Sequence[Mapping[str, Any]],
    pictures: Sequence[int],
    old: Sequence[Mapping[str, Any]],
    *,
    is_alone: bool,
    text: str,
) -> tuple[list[float | None], list[str]]:
    """Of each new dataset its weight, None for what its entry says; and sentences on them. is_alone: whether the config
    has no other datasets."""
    uncounted = uncounted_weights(text)
    times = {uncounted.get(one["name"]) for one in old}
    shares = [float(entry.get("weight", count)) for entry, count in zip(entries, pictures, strict=True)]
    if len(times) == 1 and None not in times:
        (repeats,) = times
        counted = [_rounded(share * (repeats or 1)) for share in shares]
        return [*counted], [
            f"{entry['name']}: weight {weight:g}, pictures x repeats, as the comment on the old one's asks for"
            for entry, weight in zip(entries, counted, strict=True)
        ]
    before = {one["name"]: one.get("weight") for one in old}
    if len(entries) == len(old) == 1:
        return [*before.values()], []
    if is_alone:  # of which the mix is made by their numbers
        return [None] * len(entries), []
    # A config may have weights that are yet to be filled in, or wrong.
    known = {name: weight if isinstance(weight, int | float) and weight > 0 else 1.0 for name, weight in before.items()}
    total = sum(known.values())
    split, notes = [], []
    for entry, share in zip(entries, shares, strict=True):
        weight = _rounded(total * share / (sum(shares) or 1.0))
        if isclose(known.get(entry["name"], 0.0), weight, rel_tol=1e-4):  # rounded before
            weight = known[entry["name"]]
        else:
            notes.append(f"{entry['name']}: weight {weight:g}, of the {total:g} of {', '.join(known)}")
        split.append(weight)
    if times != {None}:
        notes.append("The old weights counted no pictures, as their comments say: look at the new ones.")
    return [*split], notes


def _rounded(weight: float) -> float:
    return float(f"{weight:.6g}")
