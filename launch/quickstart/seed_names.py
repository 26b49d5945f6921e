"""Every file, script, key and claim of the AI-toolkit migration document, and what it is here: one table, read from
seed_names.yaml, for the README of a quickstart folder and for docs/guide.md (English and Chinese).

    python -m launch.quickstart.seed_names [zh]
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from configs.yaml_text import parse_yaml

Language = Literal["en", "zh"]

_TABLE = Path(__file__).with_name("seed_names.yaml")
_HEADER = {"en": ("the document", "here"), "zh": ("原文档", "这里")}


def seed_names() -> Sequence[Mapping[str, str]]:
    """The rows: what the document calls it (`seed`), and what that is here (`en`, `zh`)."""
    return cast(Sequence[Mapping[str, str]], parse_yaml(_TABLE.read_text(encoding="utf-8")).value)


def render_seed_names(language: Language = "en") -> str:
    """The table in Markdown, without a newline at its end."""
    rows = [_HEADER[language], ("---", "---"), *((row["seed"], row[language]) for row in seed_names())]
    return "\n".join(f"| {seed} | {here} |" for seed, here in rows)


if __name__ == "__main__":
    print(render_seed_names("zh" if sys.argv[1:] == ["zh"] else "en"))
