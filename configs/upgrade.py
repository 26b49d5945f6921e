"""An older config's text brought up to date: its version, and the keys that are gone since it was written."""

from pathlib import Path
from typing import Any

from configs.edit_yaml import remove, set_value
from configs.errors import InputError
from configs.loading import VERSION, read_document
from configs.suggest import REMOVED
from configs.yaml_text import YamlError


def upgrade_config(path: Path) -> tuple[str, list[str]]:
    """(the text, a sentence for each change) of a config file; every other byte of it stays. Nothing is written.

    Raises InputError for a file of a later version, or where a key that goes stands behind an alias.
    """
    value: Any = read_document(path).value
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no keys with values. Give a config.")
    text, changes = path.read_bytes().decode("utf-8-sig"), []
    version = value.get("version", VERSION)
    if version != VERSION:  # there is no earlier one yet
        raise InputError(f"{path}: version is {version!r}, and this fluxfill knows {VERSION} alone. Upgrade fluxfill.")
    try:
        for key, advice in REMOVED.items():
            name, _, inner = key.partition(".")
            if isinstance(section := value.get(name), dict) and inner in section:
                del section[inner]
                text = remove(text, (name, inner) if section else (name,))  # a section of nothing is none
                changes.append(f"{key} is gone. {advice}")
        if "version" not in value:
            text = set_value(text, ("version",), VERSION)
            changes.append(f"version is {VERSION} now, not left out: later releases read the file as what it is.")
    except YamlError as error:
        raise InputError(f"{path}: {error.reason}. Change it by hand: {changes or REMOVED}") from error
    return text, changes
