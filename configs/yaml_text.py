"""YAML as people expect it (1.2's scalars: `1e-4` is a number, `no` is text), with the line of every key."""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

# The most values of a file, each alias counted as all that it stands for: nine lines of aliases make billions.
MOST_VALUES = 100_000
_MERGE = "<<"  # of mappings: their keys, where the mapping has none of that name

_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: 1.1 takes `no` for false, `010` for 8, `24:00` for 1440, `1e-4` for text."""


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either YAML 1.1 or 1.2 would take for something other than text."""


for _name, _pattern, _first in _SCALARS:
    _expression = re.compile(rf"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _expression, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _expression, _first)


class _PlacesLoader(_Loader):
    """Loader whose aliases are nodes of their own, where they stand, not those that they mean."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if not self.check_event(yaml.AliasEvent):
            return super().compose_node(parent, index)
        event = self.get_event()
        return yaml.ScalarNode(_TAG + "str", f"*{event.anchor}", event.start_mark, event.end_mark)


class YamlError(Exception):
    """Text that is not YAML. line: counted from 1, or None where the parser has none."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


@dataclass
class Document:
    """A parsed text: its value, the line of every key and list entry (from 1), what is wrong with it, by line, and the
    keys whose value is used elsewhere by an alias."""

    value: object = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    anchors: set[KeyPath] = field(default_factory=set)


def parse_yaml(text: str) -> Document:
    """The one YAML document in `text`; an empty text gives None.

    Keys given twice and tags that are not used here are in `problems`, all of them; of a key given twice the first
    value counts. Raises YamlError where the text is not YAML at all.
    """
    root = _compose(text, _Loader)
    document = Document()
    if root is not None:
        try:
            refuse_expansion(root)
            document.value = _construct(root, (), document)
            document.anchors = _find_anchors(root)
        except RecursionError as error:
            raise YamlError("nested too deeply") from error
    return document


def refuse_expansion(root: yaml.Node) -> None:
    """Raise YamlError if a document has more than MOST_VALUES values, each alias counted as all that it stands for, or
    a value that contains itself."""
    sizes: dict[int, int] = {}

    def size_of(node: yaml.Node) -> int:
        size = sizes.setdefault(id(node), 0)  # 0: begun, not counted
        if size == 0:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in parts for part in pair]
            for part in parts:
                if sizes.get(id(part)) == 0:
                    raise YamlError("a value contains itself: remove the alias", part.start_mark.line + 1)
                size += size_of(part)
            sizes[id(node)] = size + 1
        return sizes[id(node)]

    if size_of(root) > MOST_VALUES:
        raise YamlError(f"more than {MOST_VALUES} values, each alias counted as all that it stands for")


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of the one YAML document in `text`, with the places where they stand. An alias is a scalar, "*name".
    Raises YamlError where the text is not YAML."""
    return _compose(text, _PlacesLoader)


def _compose(text: str, loader: type[yaml.SafeLoader]) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(error.problem or error.context or "unreadable", mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise YamlError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise YamlError("nested too deeply") from error


def dump_inline(value: object) -> str:
    """YAML text of a plain value on one line, which may stand behind a key, and inside brackets."""
    options: Any = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": math.inf}
    text = yaml.dump([value], Dumper=_Dumper, **options).strip()[1:-1]
    # A text of several lines is written over several; JSON, which is YAML too, escapes their ends.
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def dump_yaml(value: object) -> str:
    """YAML text of plain values, keys in their order, which `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dotted(path: KeyPath) -> str:
    """("data", "datasets", 0) as data.datasets.0."""
    return ".".join(map(str, path))


def _construct(node: yaml.Node, path: KeyPath, document: Document) -> object:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _construct_mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        entries = []
        for index, child in enumerate(node.value):
            document.lines[(*path, index)] = child.start_mark.line + 1
            entries.append(_construct(child, (*path, index), document))
        return entries
    if isinstance(node, yaml.ScalarNode):
        try:
            return _construct_scalar(node.tag.removeprefix(_TAG), node.value)
        except ValueError:
            pass
    document.problems.append((line, f"{dotted(path)} cannot be read as {node.tag}: write a plain value without a tag"))
    return None


def _construct_mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, object]:
    mapping: dict[str, object] = {}
    merges = [(key_node, value_node) for key_node, value_node in node.value if _is_merge(key_node)]
    merged = _construct_merged(merges[0][1], path, document) if merges else {}
    for key_node, _ in merges[1:]:
        where = dotted((*path, _MERGE))
        document.problems.append((key_node.start_mark.line + 1, f"{where} is given twice: write one, [*A, *B]"))
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if _is_merge(key_node):
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(
                (line, f"{dotted(path) or 'the file'} has a key that is not plain text: rename it")
            )
            continue
        key = key_node.value
        if key in mapping:
            first = document.lines[(*path, key)]
            where = "on the same line" if first == line else f"first on line {first}"
            document.problems.append((line, f"{dotted((*path, key))} is given twice, {where}: keep one of the two"))
            continue
        document.lines[(*path, key)] = line
        mapping[key] = _construct(value_node, (*path, key), document)
    return merged | mapping


def _find_anchors(root: yaml.Node) -> set[KeyPath]:
    """Keys whose value an alias means: it is composed as the very node that stands behind the key."""
    places: dict[int, KeyPath] = {}
    anchors: set[KeyPath] = set()

    def walk(node: yaml.Node, path: KeyPath) -> None:
        if id(node) in places:
            anchors.add(places[id(node)])
            return
        places[id(node)] = path
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                walk(value_node, (*path, str(key_node.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, entry in enumerate(node.value):
                walk(entry, (*path, index))

    walk(root, ())
    return anchors


def _is_merge(key_node: yaml.Node) -> bool:
    """Whether a key is the plain `<<`."""
    return isinstance(key_node, yaml.ScalarNode) and key_node.value == _MERGE and key_node.style is None


def _construct_merged(node: yaml.Node, path: KeyPath, document: Document) -> dict[str, object]:
    """The keys that `<<` brings in: of a mapping, or of a list of them, of which the first that has a key counts."""
    merged: dict[str, object] = {}
    for one in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
        value = _construct(one, path, document)
        if isinstance(value, dict):
            merged |= value
        else:
            where = dotted((*path, _MERGE))
            document.problems.append((one.start_mark.line + 1, f"{where} is no mapping: give *NAME of an &NAME"))
    return merged


def _construct_scalar(kind: str, text: str) -> object:
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise ValueError(kind)
