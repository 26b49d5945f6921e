"""YAML as people expect it (1.2's scalars: `1e-4` is a number, `no` is text), with the line of every key."""

import re
from dataclasses import dataclass, field

import yaml

KeyPath = tuple[str | int, ...]

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


class YamlError(Exception):
    """Text that is not YAML. line: counted from 1, or None where the parser has none."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


@dataclass
class Document:
    """A parsed text: its value, the line of every key and list entry (from 1), and what is wrong with it, by line."""

    value: object = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def parse_yaml(text: str) -> Document:
    """The one YAML document in `text`; an empty text gives None.

    Keys given twice and tags that are not used here are in `problems`, all of them; of a key given twice the first
    value counts. Raises YamlError where the text is not YAML at all.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(error.problem or error.context or "unreadable", mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise YamlError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise YamlError("nested too deeply") from error
    document = Document()
    if root is not None:
        document.value = _construct(root, (), document, ancestors=frozenset())
    return document


def dump_yaml(value: object) -> str:
    """YAML text of plain values, keys in their order, which `parse_yaml` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dotted(path: KeyPath) -> str:
    """("data", "datasets", 0) as data.datasets.0."""
    return ".".join(map(str, path))


def _construct(node: yaml.Node, path: KeyPath, document: Document, ancestors: frozenset[int]) -> object:
    line = node.start_mark.line + 1
    if id(node) in ancestors:
        document.problems.append((line, f"{dotted(path)} contains itself: remove the alias"))
        return None
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _construct_mapping(node, path, document, ancestors | {id(node)})
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        entries = []
        for index, child in enumerate(node.value):
            document.lines[(*path, index)] = child.start_mark.line + 1
            entries.append(_construct(child, (*path, index), document, ancestors | {id(node)}))
        return entries
    if isinstance(node, yaml.ScalarNode):
        try:
            return _construct_scalar(node.tag.removeprefix(_TAG), node.value)
        except ValueError:
            pass
    document.problems.append((line, f"{dotted(path)} cannot be read as {node.tag}: write a plain value without a tag"))
    return None


def _construct_mapping(
    node: yaml.MappingNode, path: KeyPath, document: Document, ancestors: frozenset[int]
) -> dict[str, object]:
    mapping: dict[str, object] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
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
        mapping[key] = _construct(value_node, (*path, key), document, ancestors)
    return mapping


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
