"""`fluxfill import-config`: another trainer's config as one of ours, with a line for every key of the old one."""

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs.errors import InputError
from configs.legacy.detect import import_file
from configs.legacy.draft import Imported, Verdict
from configs.legacy.left_open import tell_uncounted
from configs.legacy.render import render_config, render_json
from configs.loading import load_config
from data.sources.walk import walk_folder
from data.storage.atomic_write import write_text_atomically

_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
_LOG_COLUMNS = 160
_STYLES: dict[Verdict, str] = {
    "taken": "green",
    "converted": "cyan",
    "no equivalent": "yellow",
    "ignored by the old trainer too": "dim",
    "unknown key": "red",
    "secret, dropped": "red",
}
# Of the old trainers; one more kind in a folder is no picture that they trained on.
_OLD_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def import_config(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The old config: YAML, JSON or TOML.")],
    out: Annotated[Path, typer.Option(metavar="NEW.yaml", help="The config to write.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The old file of datasets, where there is one (sd-scripts, SimpleTuner); by default what OLD names.",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Pictures in each folder that is not on this machine, to turn epochs into steps.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace NEW.yaml if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON instead of a table.")] = False,
) -> None:
    """Translate another trainer's config. Says for every key of it what became of it.

    Reads ai-toolkit's training jobs and its older `finetune` ones, sd-scripts' TOML, the kohya_ss GUI's JSON and
    SimpleTuner's JSON. Secrets are left out. What the old config does not say has to be filled in, and is named.

    Example: fluxfill import-config config/train_lora_flux_24gb.yaml --out lora.yaml
    """
    if not force and os.path.lexists(out):
        raise InputError(f"--out {out}: is there already. Give another name, or --force to replace it.")
    if any(out.exists() and place.exists() and out.samefile(place) for place in (old, data) if place is not None):
        raise InputError(f"--out {out}: is the old config itself, which is never changed. Give another name.")
    imported = import_file(old, os.environ, lambda folder: _count_pictures(folder, pictures), data)
    try:
        write_text_atomically(out, render_config(imported, old.name, out.name))
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written ({error.strerror}). Give a file in a folder that is there."
        ) from error
    console = Console()
    if as_json:
        typer.echo(render_json(imported))
    else:
        _print_table(console, imported)
    _print_what_is_left(Console(stderr=True) if as_json else console, imported, out)


def _count_pictures(folder: str, otherwise: int | None) -> int | None:
    """Pictures in a folder and below it, or `otherwise` if it has no name, or is not on this machine."""
    if not folder or not Path(folder).is_dir():
        return otherwise
    files = (file for _, files in walk_folder(Path(folder), f"the old config's {folder}") for file in files)
    return sum(file.lower().endswith(_OLD_SUFFIXES) for file in files)


def _print_table(console: Console, imported: Imported) -> None:
    if not console.is_terminal:
        console = Console(width=_LOG_COLUMNS)
    table = Table(
        title=f"The {len(imported.lines)} keys of a config of {imported.program}", title_justify="left", expand=True
    )
    below = f"old key, below {imported.hide.rstrip('.')}" if imported.hide else "old key"
    for name, ratio in ((below, 4), ("value", 3), ("what became of it", 2), ("here", 4), ("why, or what to do", 6)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for line in imported.lines:
        table.add_row(
            *map(escape, (line.key.removeprefix(imported.hide), line.value, line.verdict, line.new, line.why)),
            style=_STYLES[line.verdict],
        )
    console.print(table)
    counts = Counter(line.verdict for line in imported.lines)
    console.print(", ".join(f"{counts[verdict]} {verdict}" for verdict in _STYLES if counts[verdict]), **_PLAIN)


def _print_what_is_left(console: Console, imported: Imported, out: Path) -> None:
    """What the old run did, what is still to be filled in, and what to type next."""
    console.print("\nWhat the old run really did:", style="bold")
    for sentence in imported.really_did:
        console.print(f"- {sentence}", **_PLAIN)
    console.print()
    left = tell_uncounted(out.read_text(encoding="utf-8"))
    try:
        load_config(out)
    except InputError as error:
        left.append(str(error))
    if left:
        console.print(f"STILL TO FILL IN in {out} before it runs:", style="bold red", **_PLAIN)
        for key, what in imported.fill_in.items():
            console.print(f"- {key}: {what}", style="red", **_PLAIN)
        console.print("\n".join(left), **_PLAIN)
    else:
        console.print(f"{out}: valid, with a comment on every value that says where it comes from", **_PLAIN)
    masked = [dataset for dataset in imported.config["data"]["datasets"] if not isinstance(dataset.get("mask"), dict)]
    if masked:
        console.print(
            f"masks: fluxfill migrate --target DIR [--mask DIR] [--source DIR] --out DIR --config {out}  # looks at "
            "every pixel of them: polarity, position, size; makes them of transparent pictures",
            **_PLAIN,
        )
    then = "  # once they are filled in" if left else ""
    console.print(f"next:  fluxfill train {out}{then}", **_PLAIN)
