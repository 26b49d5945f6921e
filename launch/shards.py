"""`fluxfill shards`: a cache verified, repaired, shown. What reads it is imported by the command that runs: it needs
torch."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from configs.errors import InputError, os_errors_named
from configs.library_warnings import quiet_libraries
from configs.loading import load_config
from configs.this_machine import count_cores

if TYPE_CHECKING:
    from data.verify.cache import CheckedCache

BAD_FOUND = 1  # exit code
_SHOWN_PROBLEMS = 100
_MOST_THREADS = 16
_LOG_COLUMNS = 160
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}

app = typer.Typer(
    help="Verify, repair and show the shards of a cache.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Place = Annotated[str, typer.Argument(metavar="DIR|CONFIG", help="The cache's folder, or the YAML file that names it.")]


@app.command()
def verify(
    place: Place,
    repair: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG",
            help="Move what is bad into the cache's quarantine folder and encode it again as this config says.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Shards read at once; by default one per core, 16 at most.")
    ] = None,
) -> None:
    """Read the whole cache and compare it with its checksums. Shards, members, indexes, and what lies beside them.

    Exit codes: 0 all is as it was written (or was repaired), 1 something is not, 2 bad input. Changes nothing without
    --repair.

    Example: fluxfill shards verify /data/cache/removal --repair configs/fill_lora.yaml
    """
    cache = _cache_folder(place)
    config = load_config(repair, []) if repair is not None else None
    console = _console()
    num_threads = threads or min(count_cores(), _MOST_THREADS)
    quiet_libraries()
    from data.verify.cache import refuse_no_cache, verify_cache

    refuse_no_cache(cache)  # before a bar is drawn

    def check(only: Collection[str] | None = None) -> "CheckedCache":
        with _reading(console) as (start, advance):
            checked = verify_cache(cache, threads=num_threads, start=start, advance=advance, only=only)
        _print_verdict(console, cache, checked)
        return checked

    if config is None:
        raise typer.Exit(BAD_FOUND if check().problems else 0)
    from data.verify.repair import refuse_other_config, repair_cache

    refuse_other_config(config, cache)
    checked, changed = repair_cache(config, check, console)
    if checked.problems:
        for path in changed:
            console.print(f"{path}: encoded again with other bytes than before; the cache lists these now.", **_PLAIN)
        checked = check(only={whole.path for whole in checked.rebuildable} | set(checked.bad))
    raise typer.Exit(BAD_FOUND if checked.problems else 0)


@app.command()
def show(
    place: Place,
    shard: Annotated[
        str | None, typer.Option(metavar="NAME", help="This shard alone: its path below the folder, or the end of it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write samples as pictures: .html (with these tables) or .png."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Samples in FILE, evenly spread.")] = 16,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The model whose VAE decodes them; by default the config's model.base."),
    ] = None,
) -> None:
    """Show what a cache holds: samples, bytes, captions, holes. Samples as pictures, too.

    Example: fluxfill shards show configs/fill_lora.yaml --out cache.html
    """
    cache = _cache_folder(place)
    base = model or (None if Path(place).is_dir() else load_config(place, []).model.base)
    if out is not None:
        _refuse_unwritable(out)
    if out is not None and base is None:
        raise InputError("--out needs the VAE that encoded the cache: give --model, or a config in the folder's place.")
    console = _console()
    quiet_libraries()
    from data.cache.manifest import cache_errors_named, read_manifest, read_shard_table
    from data.show.statistics import count_cache, find_shards
    from data.show.statistics_report import print_statistics

    with cache_errors_named(cache):
        manifest, table = read_manifest(cache), read_shard_table(cache)
    rows = find_shards(table, shard)
    with _counting(console, "indexes", len(rows)) as advance:
        counted = count_cache(cache, manifest, table, rows, advance)
    print_statistics(console, cache, manifest, counted)
    if out is None or base is None:
        return
    from data.show.sample_sheet import decode_samples, load_cache_vae, save_page, save_sheet
    from data.show.stored_samples import read_samples, spread_samples

    vae, chosen = load_cache_vae(base, manifest), spread_samples(table, rows, samples)
    with _counting(console, "pictures", len(chosen)) as advance:
        decoded = list(decode_samples(vae, read_samples(cache, manifest, table, chosen), advance))
    if out.suffix.lower() == ".png":
        save_sheet(out, decoded)
    else:
        save_page(out, cache, manifest, counted, decoded)
    console.print(f"{out}: {len(decoded)} samples", **_PLAIN)


@app.command()
def features(place: Place) -> None:
    """Print the `features=` for Hugging Face's datasets. It is that of a cache's shards, as Python.

    Example: fluxfill shards features /data/cache/removal > features.py
    """
    cache = _cache_folder(place)
    from data.cache.manifest import cache_errors_named, read_manifest, read_shard_table
    from data.show.features import datasets_features

    with cache_errors_named(cache):
        manifest, table = read_manifest(cache), read_shard_table(cache)
    typer.echo(datasets_features(cache, manifest, table), nl=False)


def _refuse_unwritable(out: Path) -> None:
    """Raise InputError if a sheet cannot be written there: before minutes of decoding, not behind them."""
    if out.suffix.lower() not in {".html", ".png"}:
        raise InputError(f"--out {out}: give a name that ends in .html or .png.")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder. Give the name of a file.")
    try:
        with TemporaryFile(dir=out.absolute().parent):
            pass
    except OSError as error:
        raise InputError(
            f"--out {out}: nothing can be written in {out.absolute().parent} ({error.strerror}). Make the folder, "
            "change its permissions, or give another."
        ) from error


def _print_verdict(console: Console, cache: Path, checked: "CheckedCache") -> None:
    """Say what was found."""
    problems = [(problem.path, problem.member, problem.what) for problem in checked.problems]
    if not problems:
        console.print(f"{cache}: all is as it was written.", **_PLAIN)
        return
    table = Table(title=f"{escape(str(cache))}: not as it was written", title_justify="left")
    for column in ("file", "member", "what is wrong"):
        table.add_column(column, overflow="fold")  # names are what it is read for
    for row in problems[:_SHOWN_PROBLEMS]:
        table.add_row(*(escape(text) for text in row))
    console.print(table)
    files = len({path for path, _, _ in problems})
    more = f"; {len(problems) - _SHOWN_PROBLEMS} more are not shown" if len(problems) > _SHOWN_PROBLEMS else ""
    console.print(f"{len(problems)} problems in {files} files{more}.", highlight=False)


def _console() -> Console:
    """As wide as the terminal; in a log file wide enough for names."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _LOG_COLUMNS)
    return console


def _cache_folder(place: str) -> Path:
    """The cache that a folder or a config's path means."""
    with os_errors_named(Path(place), "read"):
        if Path(place).is_dir():
            return Path(place)
    if Path(place).suffix in {".yaml", ".yml"}:
        cache = load_config(place, []).data.cache
        if isinstance(cache, Path):
            return cache
        raise InputError(
            f"{place}: data.cache is {cache}. Give the folder that was copied there, or a copy of it; what training "
            "fetches from a URL is checked as it comes."
        )
    raise InputError(f"{place}: neither a folder nor a config (.yaml). Give the cache's folder, or the config of it.")


@contextmanager
def _reading(console: Console) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar of bytes: yields (start, advance)."""
    columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(TextColumn("{task.description:>20}"), BarColumn(), *columns, console=console) as progress:
        bar = progress.add_task("reading shards", total=None)
        yield (lambda total: progress.update(bar, total=total)), (lambda count: progress.advance(bar, count))


@contextmanager
def _counting(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of things: yields what advances it by one."""
    columns = (MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(TextColumn("{task.description:>20}"), BarColumn(), *columns, console=console) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda: progress.advance(bar)
