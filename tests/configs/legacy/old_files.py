"""The samples of old configs, and what became of their keys."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.legacy.detect import import_file
from configs.legacy.draft import Imported, Line

SAMPLES = Path(__file__).parent / "samples"
MIGRATED = ("migrated_24gb.yaml", "migrated_40gb.yaml", "migrated_80gb.yaml")
YAML = ("lora_24gb.yaml", "full.yaml", "finetune.yaml", *MIGRATED)
ALL = (*YAML, "sd_scripts.toml", "simpletuner.json")
FOLDERS = {"/data/target": 30, "/data/sofas": 30, "/data/rooms": 30, "/data/kitchens": 10}


def import_sample(name: str) -> Imported:
    """A sample's translation, where its folders hold FOLDERS' pictures."""
    return import_file(SAMPLES / name, {}, FOLDERS.get)


def import_job(
    path: Path, process: str, *, environ: dict[str, str] | None = None, pictures: int | None = None
) -> Imported:
    """The translation of an ai-toolkit job with this process, as indented YAML."""
    indented = "".join(f"      {line}\n" for line in process.splitlines())
    path.write_text(
        f"job: extension\nconfig:\n  name: try\n  process:\n    - type: sd_trainer\n{indented}", encoding="utf-8"
    )
    return import_file(path, environ or {}, lambda folder: pictures)


def import_arguments(path: Path, text: str, *, pictures: int | None = None) -> Imported:
    """The translation of sd-scripts' arguments, in TOML, of a LoRA."""
    path.write_text(f'network_module = "networks.lora_flux"\noutput_name = "a"\n{text}\n', encoding="utf-8")
    return import_file(path, {}, lambda folder: pictures)


def line_of(imported: Imported, key: str) -> Line:
    """The one line of a key, given by its end."""
    (line,) = [line for line in imported.lines if line.key.endswith(key)]
    return line


def leaves(tree: Any, key: str = "") -> Iterator[str]:
    """Keys as the samples hold them: below sections, and below lists of sections."""
    if isinstance(tree, dict) and tree:
        for name, inner in tree.items():
            yield from leaves(inner, f"{key}.{name}" if key else name)
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        for place, inner in enumerate(tree):
            yield from leaves(inner, f"{key}[{place}]")
    else:
        yield key
