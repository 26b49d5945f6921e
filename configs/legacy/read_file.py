"""The keys and values of an old config file: YAML as the old trainers read it, JSON with comments, TOML."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from configs.errors import InputError
from configs.legacy.secrets import holds_secret_variable
from configs.yaml_text import YamlError, refuse_expansion

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|^[-+]?(\d[\d_]*)?\.\d+([eE][-+]?\d+)?$|^[-+]?\d+\.$")
_COMMENT_OR_TEXT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_LAST_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', re.DOTALL)
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_START = "Give the file that the old trainer was started with."


class _OldYaml(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, where `yes` is true, but with `1e-4` a number, as ai-toolkit patches it."""


_OldYaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_old_file(path: Path) -> Any:
    """What a file holds, by its ending, or by its first character where that says nothing.

    Raises InputError, which quotes none of the text: it may hold secrets.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file. {_START}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). {_START}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}). {_START}") from error
    if not text.strip():
        raise InputError(f"{path}: the file is empty. {_START}")
    try:
        return _parse(text, path.suffix.lower())
    except yaml.MarkedYAMLError as error:
        where = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{where}: is not YAML. Check indentation, colons and quotes there.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: is not JSON. Check commas, brackets and quotes there.") from error
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"line (\d+)", str(error))
        where = f":{place[1]}" if place else ""
        raise InputError(f"{path}{where}: is not TOML. Check equals signs, brackets and quotes there.") from error
    except YamlError as error:
        where = f":{error.line}" if error.line else ""
        raise InputError(f"{path}{where}: {error.reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a config. {_START}") from error


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix in (".json", ".jsonc") or (suffix not in (".yaml", ".yml") and text.lstrip()[0] in "{["):
        plain = _COMMENT_OR_TEXT.sub(lambda found: found[1] or " ", text)
        return json.loads(_LAST_COMMA.sub(lambda found: found[1] or "", plain))
    loader = _OldYaml(text)  # a SafeLoader: it makes no objects
    root = loader.get_single_node()
    if root is None:
        return None
    refuse_expansion(root)
    return loader.construct_document(root)


def fill_variables(tree: Any, environment: Mapping[str, str], path: Path) -> Any:
    """The same tree with every ${VARIABLE} replaced, as ai-toolkit does, but in values with one that is a secret.

    A value that is one variable alone is read as a number or a truth value where it looks like one.  Raises InputError
    with the names of those that are not set.
    """
    missing: set[str] = set()

    def value_of(found: re.Match[str]) -> str:
        missing.update({found[1]} - environment.keys())
        return environment.get(found[1], "")

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        if not isinstance(value, str) or not _VARIABLE.search(value) or holds_secret_variable(value):
            return value
        filled = _VARIABLE.sub(value_of, value)
        if not _VARIABLE.fullmatch(value):
            return filled
        try:
            scalar = _parse(filled, ".yaml")
        except (yaml.YAMLError, YamlError):
            return filled
        return scalar if isinstance(scalar, int | float) else filled

    result = fill(tree)
    if missing:
        names = ", ".join(sorted(missing))
        raise InputError(
            f"{path}: the old trainer takes values from variables of the environment that are not set: {names}. "
            f"Set them for this command: {sorted(missing)[0]}=... fluxfill import-config {path} ..."
        )
    return result
