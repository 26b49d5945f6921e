"""A translated config as YAML, with a comment on every value that says which old key it comes from; or as JSON."""

import json
import textwrap
from typing import Any

from configs.legacy.draft import Imported, one_line
from configs.legacy.left_open import HEADING
from configs.yaml_text import dump_yaml

_WIDTH = 120


def render_config(imported: Imported, old_name: str, new_name: str) -> str:
    """The text of the new config. old_name, new_name: of the two files, for the comment at its head."""
    old_name, new_name = one_line(old_name), one_line(new_name)
    head = [
        f"Imported from {old_name}, a config of {imported.program}, by fluxfill import-config.",
        "",
        f"  fluxfill check {new_name}",
        f"  fluxfill train {new_name}",
        "",
    ]
    if imported.fill_in:
        head.append(HEADING)
        head += [*(f"FILL IN {key}: {what}" for key, what in imported.fill_in.items()), ""]
    head += ["What the old run really did:", *(f"- {sentence}" for sentence in imported.really_did)]
    lines = [line for text in head for line in _comment(text, "") or ["#"]]
    lines += _render_section(imported.config, "", "", imported.notes)
    return "\n".join(lines) + "\n"


def render_json(imported: Imported) -> str:
    """{"program", "keys": what became of each old key, "really_did", "fill_in", "config"}."""
    content = {
        "program": imported.program,
        "keys": [vars(line) for line in imported.lines],
        "really_did": imported.really_did,
        "fill_in": imported.fill_in,
        "config": imported.config,
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _render_section(section: dict[str, Any], path: str, pad: str, notes: dict[str, str]) -> list[str]:
    lines: list[str] = []
    for key, value in section.items():
        place = f"{path}{key}"
        note = notes.get(place, "")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [*_comment(note, pad), f"{pad}{key}:"]
            for number, entry in enumerate(value):
                inner = _render_section(entry, f"{place}.{number}.", f"{pad}    ", notes)
                first = next(at for at, line in enumerate(inner) if not line.lstrip().startswith("#"))
                inner[first] = f"{pad}  - {inner[first].lstrip()}"
                lines += inner
        elif isinstance(value, dict):
            lines += [*_comment(note, pad), f"{pad}{key}:"]
            lines += _render_section(value, f"{place}.", f"{pad}  ", notes)
        else:
            text = f"{pad}{key}: {_render_value(value)}"
            if note and len(text) + len(note) + 3 <= _WIDTH:
                lines.append(f"{text} # {note}")
            else:
                lines += [*_comment(note, pad), text]
    return lines


def _render_value(value: Any) -> str:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    text = dump_yaml({"": value}).partition(":")[2].strip()
    return text if "\n" not in text else json.dumps(value, ensure_ascii=False)


def _comment(text: str, pad: str) -> list[str]:
    if not text:
        return []
    indent = "  " if text.startswith("- ") else ""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{pad}# ",
        subsequent_indent=f"{pad}# {indent}",
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
