"""What an imported config leaves to its user, read from its text: weights that count no pictures, and the list at its
head of what is to be filled in."""

import re
from itertools import takewhile
from typing import Any

from configs.edit_yaml import comments_of
from configs.yaml_text import KeyPath, parse_yaml

HEADING = "Values that are null below have to be filled in:"
_UNCOUNTED = re.compile(r"Put the number of pictures x (\d+) here")
_OPEN = re.compile(r"# FILL IN ([\w.]+): ")
_DATASET = re.compile(r"data\.datasets\.(\d+)\.(.+)")


def uncounted_weights(text: str) -> dict[str, int]:
    """Datasets whose weight is yet to be multiplied by the number of their pictures, as its comment says -> the weight
    of one picture."""
    found = {}
    for number, dataset in enumerate(_datasets(text)):
        comment = _UNCOUNTED.search(comments_of(text, ("data", "datasets", number, "weight")))
        if comment and dataset.get("weight") == int(comment[1]):  # else somebody did so, and left the comment
            found[str(dataset.get("name"))] = int(comment[1])
    return found


def tell_uncounted(text: str) -> list[str]:
    """A sentence for each of them."""
    return [
        f"weight of {name} is {weight:g}, but must be the number of its pictures x {weight}: put it there, and remove "
        "the comment that asks for it."
        for name, weight in uncounted_weights(text).items()
    ]


def mend_head(text: str, before: str) -> str:
    """The text of a config whose datasets were edited, with only what is still to be filled in listed at its head.
    before: the text as it was, whose datasets the list numbers."""
    head = list(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    heading = next((number for number, line in enumerate(head) if line.strip() == f"# {HEADING}"), None)
    if heading is None:
        return text
    end = next((number for number in range(heading, len(head)) if head[number].strip() == "#"), len(head))
    items: list[list[str]] = []
    for line in head[heading + 1 : end]:
        if _OPEN.match(line) or not items:
            items.append([])
        items[-1].append(line)
    kept = [line for item in items for line in _mend_item(item, text, before)]
    lines = [*head[:heading], head[heading], *kept, *head[end:]] if kept else [*head[:heading], *head[end + 1 :]]
    return "".join(lines) + text[len("".join(head)) :]


def _mend_item(lines: list[str], text: str, before: str) -> list[str]:
    """The lines of one item, with the key that it has now; none if that is not null any more."""
    found = _OPEN.match(lines[0])
    if found is None:
        return lines
    key = found[1]
    dataset = _DATASET.fullmatch(key)
    if dataset:
        name = _value(before, ("data", "datasets", int(dataset[1]), "name"))
        now = next((number for number, each in enumerate(_datasets(text)) if each.get("name") == name), None)
        key = f"data.datasets.{now}.{dataset[2]}"
    path = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
    if key.startswith("data.datasets.None.") or _value(text, path, missing="") is not None:
        return []
    return [lines[0].replace(found[1], key, 1), *lines[1:]]


def _datasets(text: str) -> list[dict[str, Any]]:
    found = _value(text, ("data", "datasets"))
    return [each if isinstance(each, dict) else {} for each in found] if isinstance(found, list) else []


def _value(text: str, path: KeyPath, missing: Any = None) -> Any:
    """What stands at a path."""
    value: Any = parse_yaml(text).value
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return missing
    return value
