"""pydantic's errors as sentences: which key, what stands there, what may stand there, what to do."""

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator
from typing import Any

from pydantic import ValidationError

from configs.errors import WhatAndCure
from configs.redact import HIDDEN, is_secret_name
from configs.suggest import suggest_key
from configs.urls import shown
from configs.yaml_text import KeyPath, dotted

JsonSchema = dict[str, Any]

_NAME = "[key]"  # pydantic's word, behind a name of the user's choice, for what is wrong with the name itself
_LONGEST_VALUE = 80  # characters of a value that a message shows


def explain_errors(
    error: ValidationError, raw: dict[str, Any], schema: JsonSchema, anchors: Collection[KeyPath] = ()
) -> list[tuple[KeyPath, WhatAndCure]]:
    """(path, problem) for each key that is wrong, in the schema's order.

    raw: what was validated.  schema: the JSON Schema that goes with it; limits and defaults are read from there, so a
    problem cannot disagree with the schema.  anchors: keys whose value is used elsewhere by an alias.
    """
    problems: dict[KeyPath, WhatAndCure] = {}
    for details in error.errors(include_url=False):
        path, node = _locate(details["loc"], schema)
        kind = details["type"]
        if isinstance(path[-1], int) and not stands_in(raw, path):  # the one entry of a list written without brackets
            path = path[:-1]
        if details["loc"][-1] == _NAME:
            section, node = _locate(details["loc"][:-2], schema)
            path, problem = (*section, details["input"], _NAME), _wrong_name(section, details["input"], node, schema)
        elif kind == "missing":
            problem = _missing(path, node, schema)
        elif kind == "extra_forbidden":
            if path[-1] != details["loc"][-1]:  # of a section that may be null
                path = (*path, details["loc"][-1])
            problem = _unknown(path, details["input"], raw, schema)
            if path in anchors:
                cure = "Put the anchor on the first entry that uses it."
                problem = WhatAndCure(f"{dotted(path)}: there is no such key", cure)
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            path, problem = _wrong_variant(path, node, details["input"], schema)
        elif kind == "value_error":
            note = "" if stands_in(raw, path) else " (the default)"
            limit = details["ctx"]["error"]
            problem = WhatAndCure(f"{dotted(path)} is {render_value(details['input'])}{note}, but {limit}")
        else:
            problem = _wrong_value(path, node, details["input"], schema)
        # Of a union each branch complains; they share the path, and the problem names all branches.
        problems[path] = problem
    told = {path: problem for path, problem in problems.items() if not _deeper(path, problems)}
    return [(path[:-1] if path[-1] == _NAME else path, problem) for path, problem in told.items()]


def render_value(value: object) -> str:
    """A value on one line, as it is written in a config; the middle of a long one left out."""
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    text = json.dumps(_without_secrets(value), ensure_ascii=False)
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[: _LONGEST_VALUE // 2]} ... {text[-_LONGEST_VALUE // 4 :]}"


def _without_secrets(value: Any) -> Any:
    """A value of a config with every URL in it as messages show it, and without what is called a token or password."""
    if isinstance(value, dict):
        return {key: HIDDEN if is_secret_name(str(key)) else _without_secrets(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_secrets(entry) for entry in value]
    return shown(value) if isinstance(value, str) and "://" in value else value


def dotted_keys(schema: JsonSchema) -> list[str]:
    """Every key of the schema: sections, the keys of every variant, those of a list's entries under index 0."""
    return list(dict.fromkeys(_walk(schema, (), schema)))


def _walk(node: JsonSchema, path: KeyPath, root: JsonSchema) -> Iterator[str]:
    for part in _variants(node, root):
        if "items" in part:
            yield from _walk(part["items"], (*path, 0), root)
        for name, child in part.get("properties", {}).items():
            yield dotted((*path, name))
            yield from _walk(child, (*path, name), root)


def _resolve(node: JsonSchema, root: JsonSchema) -> JsonSchema:
    """The node with what its $ref points to filled in; what stands beside the $ref wins."""
    if "$ref" not in node:
        return node
    return root["$defs"][node["$ref"].rpartition("/")[2]] | {key: value for key, value in node.items() if key != "$ref"}


def _variants(node: JsonSchema, root: JsonSchema) -> list[JsonSchema]:
    node = _resolve(node, root)
    alternatives = node.get("anyOf") or node.get("oneOf")
    return [_resolve(part, root) for part in alternatives] if alternatives else [node]


def _locate(loc: tuple[str | int, ...], schema: JsonSchema) -> tuple[KeyPath, JsonSchema]:
    """The path in the config of a pydantic location, and the schema of that key ({} when it has none).

    pydantic puts names of its own between the keys, for the branch of a union it tried; the schema tells them apart.
    """
    path: KeyPath = ()
    node = _resolve(schema, schema)
    for position, step in enumerate(loc):
        child = _child(node, step, schema)
        chosen = _chosen_variant(node, step, schema)
        if child is not None:
            path, node = (*path, step), _resolve(child, schema)
        elif chosen is not None:
            node = chosen
        elif position == len(loc) - 1 and "anyOf" not in node:
            return (*path, step), {}
    return path, node


def _child(node: JsonSchema, step: str | int, root: JsonSchema) -> JsonSchema | None:
    for part in [node] if "discriminator" in node else _variants(node, root):
        if isinstance(step, int) and "items" in part:
            return part["items"]
        if step in part.get("properties", {}):
            return part["properties"][step]
        if step != _NAME and (values := _values_by_name(part)):
            return next(iter(values.values()))
    return None


def _values_by_name(part: JsonSchema) -> dict[str, JsonSchema]:
    """Pattern of names -> schema of their values, of a section whose names the user chooses; of others, nothing."""
    if isinstance(further := part.get("additionalProperties"), dict):
        return {part.get("propertyNames", {}).get("pattern", ""): further}
    return part.get("patternProperties", {})


def _chosen_variant(node: JsonSchema, step: str | int, root: JsonSchema) -> JsonSchema | None:
    reference = node.get("discriminator", {}).get("mapping", {}).get(step)
    return None if reference is None else _resolve({"$ref": reference}, root)


def stands_in(raw: Any, path: KeyPath) -> bool:
    """Whether a key is written in a config."""
    try:
        for step in path:
            raw = raw[step]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _deeper(path: KeyPath, paths: Collection[KeyPath]) -> bool:
    return any(len(other) > len(path) and other[: len(path)] == path and other[-1] != _NAME for other in paths)


def _missing(path: KeyPath, node: JsonSchema, root: JsonSchema) -> WhatAndCure:
    advice = []
    if "description" in node:
        advice.append(" ".join(node["description"].split()))
    if "required" in node:
        advice.append(f"It needs {', '.join(node['required'])}.")
    if "examples" in node:
        advice.append(f"For example: {path[-1]}: {_plain(node['examples'][0])}")
    return WhatAndCure(f"{dotted(path)} is missing, but must be given: {_expected(node, root)}", " ".join(advice))


def _unknown(path: KeyPath, value: object, raw: dict[str, Any], root: JsonSchema) -> WhatAndCure:
    found = f"{dotted(path)} is {HIDDEN if is_secret_name(str(path[-1])) else render_value(value)}, but"
    keys = dotted_keys(root)
    section = dotted(tuple(0 if isinstance(step, int) else step for step in path[:-1]))
    if dotted(path) in keys:  # a key of another type of this section
        kind = raw[section]["type"]
        return WhatAndCure(
            f"{found} {section}.type {kind} has no such key",
            f"Remove it or change the type; on the command line, {section}='{{type: {kind}}}' replaces the whole "
            "section.",
        )
    return WhatAndCure(f"{found} there is no such key", suggest_key(section, str(path[-1]), keys))


def _wrong_name(path: KeyPath, name: object, node: JsonSchema, root: JsonSchema) -> WhatAndCure:
    """path, node: of the section in which the user chooses the names."""
    pattern = next(pattern for part in _variants(node, root) for pattern in _values_by_name(part))
    found = f"{dotted(path)} has the name {render_value(name)}, but names there must be"
    return WhatAndCure(f"{found} {_expected_single({'type': 'string', 'pattern': pattern})}", "Rename it.")


def _wrong_variant(path: KeyPath, node: JsonSchema, value: object, root: JsonSchema) -> tuple[KeyPath, WhatAndCure]:
    name = node["discriminator"]["propertyName"]
    kinds = list(node["discriminator"]["mapping"])
    key = (*path, name)
    if isinstance(value, dict) and name in value:
        return key, _wrong_value(key, {"enum": kinds, "type": "string"}, value[name], root)
    missing = f"{dotted(key)} is missing, but must be given: {_either(kinds)}"
    return key, WhatAndCure(missing, f"For example: {name}: {kinds[0]}")


def _wrong_value(path: KeyPath, node: JsonSchema, value: object, root: JsonSchema) -> WhatAndCure:
    what = f"{dotted(path)} is {render_value(value)}, but must be {_expected(node, root)}"
    return WhatAndCure(what, _advice(node, value, root))


def _advice(node: JsonSchema, value: object, root: JsonSchema) -> str:
    parts = _variants(node, root)
    types = {part.get("type") for part in parts}
    if isinstance(value, str):
        alike = difflib.get_close_matches(value.lower(), [text for part in parts for text in _choices(part)], n=1)
        if alike:
            return f"Did you mean {alike[0]}?"
        if types & {"integer", "number"} and (readings := _readings(value, whole="number" not in types)):
            if "." in readings[0] and "," in value:
                return f"Decimals have a point, not a comma: {' or '.join(readings)}"
            return f"Write it without quotes, underscores or commas: {readings[0]}"
    elif value is not None and not isinstance(value, dict | list) and "string" in types and not _choices(parts[0]):
        return f"Write it in quotes: {json.dumps(_plain(value))}"
    if (
        isinstance(value, int | float)
        and "multipleOf" in parts[0]
        and parts[0]["minimum"] < value < parts[0]["maximum"]
    ):
        step = parts[0]["multipleOf"]
        return f"Nearest: {int(value // step * step)} or {int(value // step * step + step)}."
    if "discriminator" in node:
        return (
            f"For example: {{{node['discriminator']['propertyName']}: {next(iter(node['discriminator']['mapping']))}}}"
        )
    if "properties" in parts[0]:
        remedy = ", or remove it to have its defaults." if "default" in node else "."
        return f"Give it keys ({', '.join(parts[0]['properties'])}){remedy}"
    if "default" in node:
        return f"Leave the key out for the default, {_plain(node['default'])}."
    if "examples" in node:
        return f"For example: {_plain(node['examples'][0])}"
    return "Write such a value."


def _readings(text: str, *, whole: bool) -> list[str]:
    """The numbers that a text may mean: in 1,5 the comma stands for a point, in 10,000 it groups digits, and 1,500 may
    be either. whole: only the latter."""
    digits = text.replace("_", "")
    groups = "," not in digits or re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", digits) is not None
    readings = [digits.replace(",", ".")] if digits.count(",") == 1 and not whole else []
    readings += [digits.replace(",", "")] if groups else []
    return [reading for reading in readings if _is_number(reading)]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _plain(value: object) -> str:
    """A value as YAML writes it where no quotes are needed."""
    return value if isinstance(value, str) and value else render_value(value)


def _choices(part: JsonSchema) -> list[str]:
    """The words that a schema without alternatives allows; none where it allows more than a few words."""
    if part.get("type") == "boolean":
        return ["true", "false"]
    if part.get("type") == "null":
        return ["null"]
    return [_plain(choice) for choice in part.get("enum", [part["const"]] if "const" in part else [])]


def _expected(node: JsonSchema, root: JsonSchema) -> str:
    """What may stand there: "a whole number above 0 or auto"."""
    if "discriminator" in node:
        name, kinds = node["discriminator"]["propertyName"], list(node["discriminator"]["mapping"])
        return f"a section with {name}: {_either(kinds)}"
    parts = _variants(node, root)
    texts: list[str] = []
    for part in parts:
        entry = part.get("items")
        if entry is None:
            texts += _choices(part) or [_expected_single(part)]
        elif entry in parts:
            texts.append("a list of one or more such" if {**part, **node}.get("minItems") else "a list of such")
        else:
            many = "one or more entries" if part.get("minItems") else "entries"
            texts.append(f"a list of {many}, each {_expected(entry, root)}")
    return _either(texts)


def _expected_single(node: JsonSchema) -> str:
    kind = node.get("type")
    if kind in ("integer", "number"):
        return _expected_number(node)
    if kind == "string" and "pattern" in node and len(node.get("examples", ())) > 1:
        return f"text as {_either(node['examples'])}"  # which say more than the pattern
    if kind == "string" and "pattern" in node:
        return f"text that matches {node['pattern']}"
    if kind == "string" and node.get("format") == "path":
        return "a path"
    if kind == "string":
        return "text that is not empty" if node.get("minLength") else "text"
    return "a section of keys"


def _expected_number(node: JsonSchema) -> str:
    whole = node["type"] == "integer"
    noun = f"a multiple of {node['multipleOf']}" if "multipleOf" in node else "a whole number" if whole else "a number"
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    if whole and below is not None:
        high, below = below - 1, None
    if low is not None and high is not None:
        return f"{noun} from {low} to {high}"
    limits = [("of at least", low), ("above", above), ("of at most", high), ("below", below)]
    return " ".join([noun, " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)]).rstrip()


def _either(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
