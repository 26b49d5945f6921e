"""Edits of a config's text: a key set, a key removed, an entry appended; every other byte stays as its author left it.

No YAML is written anew. The parser says where a value stands, and only that part of the text is replaced, so comments,
quotes, anchors, long lines and line ends are kept by construction.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from configs.errors import InputError
from configs.yaml_text import KeyPath, YamlError, compose_yaml, dotted, dump_inline, parse_yaml

_DATASETS = ("data", "datasets")
# Where a dataset's pictures come from. All other keys of its entry, such as weight and flip, say what is made of them.
_PLACES = ("target", "source", "mask", "tars", "members", "table", "columns")
_NOT_HERE = "{} stands elsewhere in the file, behind an alias"
_OF_MASKS = ("dilate", "variants")  # how a dataset's own masks are changed, whichever folder they are in


def put_datasets(text: str, entries: Sequence[Mapping[str, Any]], instead_of: Collection[str] = ()) -> str:
    """A config's text with datasets in data.datasets.

    text: of a valid config.  entries: of each its name, and where its pictures are.  It takes the place of the one of
    its name, of which what it does not say stays (weight, flip, how masks grow), or is appended.  instead_of: names of
    those that go, unless an entry has the name.  Raises InputError where that cannot be done without touching other
    values, such as those that an alias shares.
    """
    wanted: Any = parse_yaml(text).value
    gone = set(instead_of) - {entry["name"] for entry in entries}
    try:
        edited = _put_datasets(text, wanted["data"]["datasets"], entries, gone)
        document = parse_yaml(edited)
    except YamlError:
        document = None
    if document is None or document.problems or document.value != wanted:
        raise InputError(
            f"{dotted(_DATASETS)} shares values with other keys, by aliases. Put there by hand: {dump_inline(entries)}"
        )
    return edited


def _put_datasets(
    text: str, datasets: list[dict[str, Any]], entries: Sequence[Mapping[str, Any]], gone: set[str]
) -> str:
    """The edited text. datasets: those in the text; become those that are wanted."""
    for entry in entries:
        index = next((number for number, known in enumerate(datasets) if known["name"] == entry["name"]), None)
        if index is None:
            text = append_entry(text, _DATASETS, entry)
            datasets.append(dict(entry))
        else:
            known, datasets[index] = datasets[index], in_place_of(datasets[index], entry)
            text = _change(text, (*_DATASETS, index), known, datasets[index])
    for index in reversed(range(len(datasets))):
        if datasets[index]["name"] in gone:
            text = remove(text, (*_DATASETS, index))
            del datasets[index]
    return text


def in_place_of(known: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry, with what the known one, whose place it takes, says beside where its pictures are: its weight, whether
    it is flipped, how its masks grow, or are drawn."""
    wanted = {key: value for key, value in known.items() if key not in _PLACES} | dict(entry)
    mask = known.get("mask")
    if isinstance(mask, dict) and isinstance(entry.get("mask"), str):
        kept = {key: mask[key] for key in _OF_MASKS if key in mask and mask.get("random") is None}
        wanted["mask"] = {"folder": entry["mask"], **kept} if kept else entry["mask"]
    elif isinstance(mask, dict) and isinstance(entry.get("mask"), dict) and mask.get("random") is not None:
        wanted["mask"] = mask
    return wanted


def _change(text: str, path: KeyPath, known: Any, wanted: Any) -> str:
    """The text with `wanted` at a path where `known` stands, key by key where both are mappings."""
    if not (isinstance(known, dict) and isinstance(wanted, dict)):
        return set_value(text, path, wanted)
    for key, value in wanted.items():
        if key not in known or known[key] != value:
            text = _change(text, (*path, key), known.get(key), value)
    for key in known.keys() - wanted.keys():
        text = remove(text, (*path, key))
    return text


def set_nested(text: str, path: KeyPath, value: Any) -> str:
    """The text with another value for a key, whose sections are made where they are not there; or for an entry of a
    list, which is written anew. Raises YamlError where set_value does."""
    section: Any = parse_yaml(text).value
    for depth, step in enumerate(path[:-1], start=1):
        section = section.get(step) if isinstance(section, dict) else section[step]
        if section is None:
            for key in reversed(path[depth:]):
                value = {key: value}
            return set_value(text, path[:depth], value)
    if isinstance(section, list):
        return set_value(text, path[:-1], [value if index == path[-1] else old for index, old in enumerate(section)])
    return set_value(text, path, value)


def set_value(text: str, path: KeyPath, value: Any) -> str:
    """The text with another value for a key; one that is not there comes last in its section.

    Raises YamlError where the section stands elsewhere, behind an alias or <<, whose values other keys share.
    """
    section, key = _find(text, path[:-1]), path[-1]
    if not isinstance(section, yaml.MappingNode):
        raise YamlError(_NOT_HERE.format(dotted(path[:-1])))
    index = _index_of(section, key)
    if index is None:
        return _add(text, section, f"{key}: {dump_inline(value)}")
    name, node = section.value[index]
    start, end = node.start_mark.index, max(_end(text, node), name.end_mark.index + 1)
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and "#" not in text[name.end_mark.index : start]:
        start = name.end_mark.index + 1  # the line of the key, not the one below
    return _splice(text, start, end, ("" if text[start - 1] == " " else " ") + dump_inline(value))


def drop_comment(text: str, path: KeyPath) -> str:
    """The text without the comment behind a key's value, on its line; of a value within brackets, behind those."""
    nodes = [_find(text, path[:depth]) for depth in range(1, len(path) + 1)]
    node = next((node for node in nodes if isinstance(node, yaml.CollectionNode) and node.flow_style), nodes[-1])
    assert node is not None
    end = _end(text, node)
    behind = text[end : _line_end(text, end)]
    return _splice(text, end, end + len(behind), "") if behind.lstrip().startswith("#") else text


def comments_of(text: str, path: KeyPath) -> str:
    """The comments above a key and behind its value, on one line; "" without the key, or behind an alias."""
    section = _find(text, path[:-1])
    index = _index_of(section, path[-1]) if isinstance(section, yaml.MappingNode) else None
    if index is None or not isinstance(section, yaml.MappingNode):
        return ""
    name, node = section.value[index]
    start = _line_end(text, _end(text, section.value[index - 1][1])) if index else section.start_mark.index
    lines = text[start : name.start_mark.index].splitlines()
    end = _end(text, node)
    lines.append("#" + text[end : _line_end(text, end)].partition("#")[2])
    return " ".join(line.lstrip().removeprefix("#").strip() for line in lines if line.lstrip().startswith("#")).strip()


def remove(text: str, path: KeyPath) -> str:
    """The text without a key, or an entry of a list, that stands there. Raises YamlError if it stands elsewhere, behind
    an alias or <<."""
    section = _find(text, path[:-1])
    index = _index_of(section, path[-1]) if isinstance(section, yaml.MappingNode) else path[-1]
    if not isinstance(section, yaml.CollectionNode) or not isinstance(index, int):
        raise YamlError(_NOT_HERE.format(dotted(path)))
    spans = _spans(text, section)
    start, end = spans[index]
    line = text.rfind("\n", 0, start) + 1
    if not section.flow_style and not text[line:start].strip():  # on lines of its own
        return _splice(text, line, _line_end(text, end) + len(_newline(text)), "")
    if index + 1 < len(spans):
        return _splice(text, start, spans[index + 1][0], "")
    return _splice(text, spans[index - 1][1] if index else start, end, "")


def _spans(text: str, section: yaml.CollectionNode) -> list[tuple[int, int]]:
    """Where each of its keys with its value, or of its entries with its dash, begins and ends."""
    if isinstance(section, yaml.MappingNode):
        return [(name.start_mark.index, max(_end(text, node), name.end_mark.index + 1)) for name, node in section.value]
    starts = [entry.start_mark.index for entry in section.value]
    if not section.flow_style:
        starts = [text.rindex("-", 0, start) for start in starts]
    return [(start, _end(text, entry)) for start, entry in zip(starts, section.value, strict=True)]


def append_entry(text: str, path: KeyPath, entry: Mapping[str, Any]) -> str:
    """The text with one more entry, a mapping, at the end of a list that is not empty."""
    entries = _find(text, path)
    assert isinstance(entries, yaml.SequenceNode) and entries.value
    if entries.flow_style:
        return _add(text, entries, dump_inline(dict(entry)))
    dash, column = entries.start_mark.column, entries.value[0].start_mark.column
    first, *rest = (f"{key}: {dump_inline(value)}" for key, value in entry.items())
    lines = [f"{'-':<{column - dash}}{first}", *(" " * (column - dash) + line for line in rest)]
    return _add(text, entries, *lines)


def _add(text: str, node: yaml.CollectionNode, *lines: str) -> str:
    """The text with lines at the end of a mapping or list, or with what they say inside its brackets."""
    if node.flow_style:
        last = node.value[-1] if node.value else None
        if last is None:
            return _splice(text, node.start_mark.index + 1, node.start_mark.index + 1, lines[0])
        end = _end(text, last[1] if isinstance(last, tuple) else last)
        return _splice(text, end, end, f", {lines[0]}")
    column = node.start_mark.column
    place = _behind_comments(text, _line_end(text, _end(text, node)), column)
    return _splice(text, place, place, "".join(f"{_newline(text)}{' ' * column}{line}" for line in lines))


def _find(text: str, path: KeyPath) -> yaml.Node | None:
    """The node at a path, None if there is none."""
    node = compose_yaml(text)
    for step in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
        elif isinstance(node, yaml.MappingNode) and (index := _index_of(node, step)) is not None:
            node = node.value[index][1]
        else:
            return None
    return node


def _index_of(section: yaml.MappingNode, key: str | int) -> int | None:
    return next((number for number, (name, _) in enumerate(section.value) if name.value == key), None)


def _end(text: str, node: yaml.Node) -> int:
    """Where a node's own text ends, without the comments behind it, which the parser counts among a block's."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(text, last[1] if isinstance(last, tuple) else last)
    return len(text[: node.end_mark.index].rstrip())


def _line_end(text: str, place: int) -> int:
    """Where the line of a place ends, ahead of its newline."""
    end = text.find(_newline(text), place)
    return len(text) if end < 0 else end


def _behind_comments(text: str, line_end: int, column: int) -> int:
    """The end of the last of the comment lines below, if there are any that stand at least as far to the right."""
    newline = _newline(text)
    for line in text[line_end + len(newline) :].split(newline):
        if not line.startswith(" " * column) or not line.lstrip().startswith("#"):
            break
        line_end += len(newline) + len(line)
    return line_end


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _splice(text: str, start: int, end: int, replacement: str) -> str:
    return text[:start] + replacement + text[end:]
