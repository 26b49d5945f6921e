"""`fluxfill migrate`: the old folders of an inpainting trainer -> a dataset, a report, an entry in a config."""

import difflib
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from configs.data_schema import CaptionsConfig, DataConfig
from configs.edit_yaml import put_datasets
from configs.errors import InputError
from configs.legacy.left_open import mend_head, tell_uncounted
from configs.loading import VERSION, load_config, read_document
from configs.supervision import BAD_INPUT
from configs.yaml_text import dump_yaml
from data.migrate.report import REPORT, How, MigrationReport, OldFolders
from data.sources.problems import print_problems, printable, sorted_by_kind
from data.storage.atomic_write import write_atomically
from launch.replaced_datasets import take_over

_STAGES = {"look": "looking at pictures", "write": "writing the dataset", "draw": "drawing the report"}
_INTERRUPTED = 130  # as shells say it
_LOG_COLUMNS = 160  # paths are not broken in a log
_DONE = {"copy": ", copied", "link": ", hard-linked", "reference": ", left where they are"}
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def migrate(
    target: Annotated[
        Path,
        typer.Option(
            metavar="DIR|LIST",
            help="The pictures to learn; the folder may hold the others too, as a_mask and a_masked. Or a list of all "
            "(.csv, .jsonl, .parquet), with a column for each.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new dataset's folder.")],
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Their masks. Without: holes are read from transparency or from the pair, or drawn while training.",
            show_default=False,
        ),
    ] = None,
    masked: Annotated[
        Path | None,
        typer.Option(
            "--masked", "--source", metavar="DIR", help="Their masked pictures: see above.", show_default=False
        ),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the pictures.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Hard-link them, which takes no room: the default.")] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Leave them where they are, and point at them by symbolic links.")
    ] = False,
    hole: Annotated[
        Literal["auto", "white", "black"],
        typer.Option(help="Which colour of the old masks is the hole; auto: the pictures tell."),
    ] = "auto",
    caption: Annotated[
        str, typer.Option(metavar="TEXT", help="The caption of a picture without one.", show_default=False)
    ] = "",
    trigger: Annotated[
        str | None, typer.Option(metavar="WORD", help="A word to put in front of every caption.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="The dataset's name in a config.")] = "migrated",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Put the dataset into this config; the rest of it stays.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look, and write report.html.")] = False,
) -> None:
    """Make a dataset of another inpainting trainer's folders. Says what is wrong with them.

    Files belong together by their names. The masked pictures (`masked_images`, `source_image_dir`) are what the old
    trainer showed its model. Where they are the target with a hole they are not needed: training cuts the hole itself,
    in the grey that FLUX.1 Fill expects. Where they show something else in the hole, as in object removal, they are
    kept as source.

    Nothing in the old folders is changed. What cannot be used is in quarantine: left out, and shown with its reason in
    OUT/report.html. Stopped at any moment, the same command does the rest.

    Exit codes: 0 done, also if some triples were left out; 2 nothing can be used, or bad input.

    Example: fluxfill migrate --target old/target --mask old/masks --masked old/masked --out dataset --config train.yaml
    """
    from data.migrate.page import write_page
    from data.migrate.run import Options
    from data.migrate.run import migrate as migrate_folders

    ways: dict[How, bool] = {"copy": copy, "link": link, "reference": reference}
    chosen = [way for way, is_asked in ways.items() if is_asked]
    if len(chosen) > 1:
        raise InputError(f"--{' and --'.join(chosen)} exclude each other. Give one of them, or none: --link.")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"--name {name}: give letters, digits, underscores and hyphens only.")
    known = None if config is None else _look_into(config)
    options = Options(
        how=chosen[0] if chosen else "link",
        dry_run=dry_run,
        hole=hole,
        captions=CaptionsConfig(default=caption, trigger=trigger or None),
        name=name,
    )
    if known is not None:
        options = replace(options, max_megapixels=known.max_megapixels)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _LOG_COLUMNS)
    commands = [f"fluxfill {verb} {shlex.quote(str(config or 'CONFIG.yaml'))}" for verb in ("check", "train")]
    try:
        with _progress(console) as advance:
            report = migrate_folders(OldFolders(target, mask, masked), out, options, advance)
            page = write_page(
                report, commands, lambda *count: advance("draw", *count), max_megapixels=options.max_megapixels
            )
    except KeyboardInterrupt as error:
        console.print("Stopped. The same command goes on from here.", **_PLAIN)
        raise typer.Exit(_INTERRUPTED) from error
    except InputError:  # of a full disk, too
        raise
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise InputError(
            f"--out {out}: cannot be written ({place}{error.strerror}). Mend that and run the same command again, or "
            "choose another folder."
        ) from error
    _print_problems(console, report)
    _print_summary(console, report, page)
    if not report.kept:
        console.print("Nothing can be trained on yet. Do what is said above, and run the same command again.", **_PLAIN)
        raise typer.Exit(BAD_INPUT)
    if config is None or known is None:
        console.print("\nThe dataset, for data.datasets of a config (--config FILE puts it there):", **_PLAIN)
        console.print(_indented(dump_yaml(report.datasets)), **_PLAIN)
    else:
        _put_into_config(console, config, known, report)
    if dry_run:
        console.print("\nThis was a dry run: the same command without --dry-run writes the dataset.", **_PLAIN)
    else:
        console.print("\nNext:\n" + _indented("\n".join(commands)), **_PLAIN)


def _print_problems(console: Console, report: MigrationReport) -> None:
    """Why triples were left out, then what else to look at."""
    listed_in = None if report.dry_run else Path(report.out) / REPORT
    left_out = [problem for triple in report.quarantined for problem in triple.problems]
    if left_out:
        count = len(report.quarantined)
        title = f"{count:,} of {len(report.triples):,} triples in quarantine"
        print_problems(console, sorted_by_kind(left_out), title, "red", listed_in)
    others = [*report.problems, *(problem for triple in report.kept for problem in triple.problems)]
    if others:
        print_problems(
            console,
            sorted_by_kind(others),
            f"{len(others):,} thing{'s' * (len(others) > 1)} to look at",
            "yellow",
            listed_in,
        )


def _print_summary(console: Console, report: MigrationReport, page: Path) -> None:
    kept, left_out = len(report.kept), len(report.quarantined)
    done = _DONE[report.how] if kept and not report.dry_run else ""
    rows = [("triples", f"{len(report.triples):,}"), ("kept", f"{kept:,}{done}")]
    rows += [("in quarantine", f"{left_out:,}, each with its reason in the report")] if left_out else []
    rows += [("hole", str(report.hole))] if any(triple.mask for triple in report.triples) else []
    rows += [("masked", str(report.masked))] if any(triple.masked for triple in report.triples) else []
    shares = [triple.hole_share for triple in report.kept if triple.hole_share is not None]
    if shares:
        rows.append(("holes", f"{min(shares):.0%} to {max(shares):.0%} of the picture, median {median(shares):.0%}"))
    if kept:
        rows.append(("holes from", _render_counts(Counter(triple.hole_from for triple in report.kept))))
        rows.append(("captions from", _render_counts(report.captions)))
    rows += [("note", note) for note in report.notes]
    rows.append(("dataset", report.out))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(printable(value), style="bold red" if name == "in quarantine" else ""))
    table.add_row("report", Text(printable(str(page)), style=Style(link=page.absolute().as_uri())))
    console.print(table)


def _render_counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


@dataclass(frozen=True)
class _Known:
    """What a migration has to know of a config.  targets: of each dataset the folder, None if it has none.  is_valid:
    no value of it is yet to be filled in, or wrong."""

    max_megapixels: float
    targets: dict[str, Path | None]
    is_valid: bool


def _look_into(path: Path) -> _Known:
    """Look into a config, which may have values yet to be filled in, as `fluxfill import-config` leaves the masks that
    are made here. Raises InputError, as `check` does, if it is none that datasets can be put into."""
    try:
        data = load_config(path).data
    except InputError:
        known = _look_into_unfinished(path)
        if known is None:
            raise
        return known
    return _Known(data.max_megapixels, {each.name: each.target for each in data.datasets}, is_valid=True)


def _look_into_unfinished(path: Path) -> _Known | None:
    """Of a config that is not valid; None if it has no datasets with names."""
    document = read_document(path)
    value: Any = document.value
    is_ours = isinstance(value, dict) and value.get("version", VERSION) == VERSION and not document.problems
    data = value.get("data") if is_ours else None
    datasets = data.get("datasets") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(datasets, list) or not datasets:
        return None
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in datasets):
        return None
    targets = {each["name"]: each.get("target") for each in datasets}
    limit = data.get("max_megapixels")
    return _Known(
        limit if isinstance(limit, int | float) and limit > 0 else DataConfig.model_fields["max_megapixels"].default,
        {name: Path(place).expanduser() if isinstance(place, str) else None for name, place in targets.items()},
        is_valid=False,
    )


def _put_into_config(console: Console, path: Path, known: _Known, report: MigrationReport) -> None:
    """Put the datasets into a config's file, show what changes there, and say what is still to be filled in. Raises
    InputError if one of their names is that of a dataset of other pictures."""
    path = path.resolve()  # a link to a config stays one
    before = path.read_bytes().decode()  # with its line ends
    out, old = Path(report.out).resolve(), Path(report.folders["target"]).resolve()
    # Of an earlier migration, or the place that a new config keeps for this one; or of the old folder itself, as in a
    # config that was imported.
    replaced = [name for name, target in known.targets.items() if target and _is_below(target.resolve(), out, old)]
    names = {entry["name"] for entry in report.datasets} - {*replaced}
    for name, target in known.targets.items():
        if name in names and (target is None or target.is_dir()):
            raise InputError(
                f"{path}: the dataset {name} is there already, of {target or 'other pictures'}. Give this "
                "one another --name, or, if it takes the place of that one, remove that one from the config."
            )
    entries, notes = take_over(report.datasets, _count_pictures(report), before, replaced)
    after = mend_head(put_datasets(before, entries, instead_of=replaced), before)
    if after == before:
        console.print(f"\n{path}: has the datasets already.", **_PLAIN)
    else:
        console.print(f"\n{path}: {'would change' if report.dry_run else 'changed'}:", **_PLAIN)
        for line in list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1))[2:]:
            style = {"+": "green", "-": "red", "@": "dim"}.get(line[0], "")
            console.print(Text(f"  {printable(line)}", style=style), soft_wrap=True)
        for note in notes:
            console.print(printable(note), **_PLAIN)
    if report.dry_run:
        return
    if after != before:
        mode = path.stat().st_mode
        write_atomically(path, lambda temporary: _write_config(temporary, after, must_be_valid=known.is_valid))
        path.chmod(mode)
    uncounted = tell_uncounted(after)
    if not known.is_valid or uncounted:
        _print_what_is_left(console, path, uncounted)


def _count_pictures(report: MigrationReport) -> list[int]:
    """Of each new dataset its pictures."""
    places = [f"{Path(report.out).absolute()}/target/{triple.name}" for triple in report.kept]
    return [sum(place.startswith(f"{entry['target']}/") for place in places) for entry in report.datasets]


def _print_what_is_left(console: Console, path: Path, uncounted: Sequence[str]) -> None:
    """uncounted: sentences on weights that count no pictures yet."""
    left = list(uncounted)
    try:
        load_config(path)
    except InputError as error:
        left.insert(0, str(error))
    if left:
        console.print(f"\nSTILL TO FILL IN in {path} before it runs:", style="bold red", **_PLAIN)
        console.print("\n".join(left), **_PLAIN)
    else:
        console.print(f"\n{path}: valid, nothing is left to be filled in.", **_PLAIN)


def _is_below(path: Path, *folders: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _write_config(path: Path, text: str, *, must_be_valid: bool) -> None:
    """Raises InputError if it must be a valid config and is none any more."""
    path.write_bytes(text.encode())
    if must_be_valid:
        load_config(path)


def _indented(text: str) -> str:
    return textwrap.indent(text.rstrip(), "  ")


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage. Yields what any thread tells (stage, how many are done, of how many)."""
    lock, bars = Lock(), {}
    columns = (MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(TextColumn("{task.description:>20}"), BarColumn(), *columns, console=console) as progress:

        def advance(stage: str, done: int, total: int) -> None:
            with lock:
                if stage not in bars:
                    bars[stage] = progress.add_task(_STAGES[stage], total=total)
                progress.update(bars[stage], completed=max(done, progress.tasks[bars[stage]].completed))

        yield advance
