"""The page report.html: what a migration found, in sentences and pictures, in one file that needs no other."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.yaml_text import dump_yaml
from data.migrate.report import HISTOGRAM_BINS, REPORT, CaptionFrom, HoleFrom, MigratedTriple, MigrationReport
from data.migrate.thumbnails import Thumbnail, draw_triple
from data.sources.problems import KINDS, Problem, printable
from data.storage.atomic_write import write_text_atomically

PAGE = "report.html"
_TITLE_END, _HEAD_BYTES = "fluxfill migrate", 2_000  # of the page; its title stands in its first bytes
MOST_CARDS = 100  # of each kind of problem: a page of 100,000 triples has some MB
_SAMPLE = 36  # of the good ones
_THREADS = 8  # each holds the pictures of a triple, decoded
_MOST_LINES = 500  # of a table
_MOST_ORPHANS = 20  # of each folder
_BAR_STEP, _BAR_WIDTH, _CHART_HEIGHT = 40, 30, 120  # of the histogram, in units of its drawing

_CAPTIONS: dict[CaptionFrom, str] = {
    "target": "beside the target",
    "masked": "beside the masked picture",
    "table": "from the table",
    "default": "the default",
    "none": "none",
}
_OTHER_HOLES: dict[HoleFrom, str] = {
    "alpha": "Masks that were made from transparency",
    "difference": "Masks that were made from where target and masked picture differ",
    "none": "Kept without a mask, with holes drawn at random while training",
}
_DONE = {"copy": "copied to", "link": "hard-linked into", "reference": "referred to from"}


@dataclass(frozen=True)
class _Card:
    """A triple with its pictures, and what is wrong with it: of one kind."""

    triple: MigratedTriple
    problems: list[Problem]
    thumbnails: list[Thumbnail]


@dataclass(frozen=True)
class _Group:
    """The problems of a kind. count: of all, shown or not.  lines: of no triple.  more: triples that are not shown."""

    kind: str
    count: int
    lines: list[Problem]
    cards: list[_Card]
    more: int


@dataclass(frozen=True)
class _Bar:
    """Of the histogram. label: the lower end of its bin, in percent."""

    x: int
    y: float
    height: float
    count: int
    label: int


def write_page(
    report: MigrationReport, commands: Sequence[str], advance: Callable[[int, int], None], *, max_megapixels: float
) -> Path:
    """Write OUT/report.html; returns its path. commands: what to type next.

    advance: told how many triples' thumbnails are drawn, of how many.
    """
    path = Path(report.out) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)  # which a dry run has not made
    write_text_atomically(path, render_page(report, commands, advance, max_megapixels=max_megapixels))
    return path


def is_page(path: Path) -> bool:
    """Whether a file is the page of some migration."""
    with suppress(OSError), path.open("rb") as file:
        return f"{_TITLE_END}</title>".encode() in file.read(_HEAD_BYTES)
    return False


def render_page(
    report: MigrationReport, commands: Sequence[str], advance: Callable[[int, int], None], *, max_megapixels: float
) -> str:
    """The page as HTML. Of each kind of problem at most MOST_CARDS triples have their pictures on it."""
    of_kind = {kind: _of_kind(report, kind) for kind in KINDS}
    shown = {kind: triples[:MOST_CARDS] for kind, (_, triples) in of_kind.items()}
    good = _spread([triple for triple in report.kept if not triple.problems], _SAMPLE)
    drawn = _draw([*good, *(triple for triples in shown.values() for triple in triples)], advance, max_megapixels)
    groups = [
        _Group(
            kind,
            len(lines) + sum(len(_problems(triple, kind)) for triple in triples),
            lines[:_MOST_LINES],
            [_Card(triple, _problems(triple, kind), drawn[triple.name]) for triple in shown[kind]],
            len(triples) - len(shown[kind]) + max(0, len(lines) - _MOST_LINES),
        )
        for kind, (lines, triples) in of_kind.items()
        if lines or triples
    ]
    shares = [triple.hole_share for triple in report.kept if triple.hole_share is not None]
    return _TEMPLATE.render(
        report=report,
        headline=_headline(report),
        title_end=_TITLE_END,
        findings=_findings(report),
        groups=groups,
        num_problems=sum(group.count for group in groups),
        quarantined=report.quarantined[:_MOST_LINES],
        good=[_Card(triple, [], drawn[triple.name]) for triple in good],
        num_good=sum(not triple.problems for triple in report.kept),
        bars=_bars(report.hole_histogram),
        chart_width=HISTOGRAM_BINS * _BAR_STEP,
        chart_height=_CHART_HEIGHT,
        bar_width=_BAR_WIDTH,
        median_hole=median(shares) if shares else None,
        captions=[(words, report.captions.get(origin, 0)) for origin, words in _CAPTIONS.items()],
        orphans={folder: (names[:_MOST_ORPHANS], len(names)) for folder, names in report.orphans.items() if names},
        entry=dump_yaml({"datasets": report.datasets}),
        commands=commands,
        all_are=f"{'without --dry-run ' if report.dry_run else ''}all are in {REPORT}",
    )


def _headline(report: MigrationReport) -> str:
    kept, total = len(report.kept), len(report.triples)
    verb = "would be kept" if report.dry_run else "are ready to train on"
    return f"All {total:,} triples {verb}." if kept == total > 0 else f"{kept:,} of {total:,} triples {verb}."


def _findings(report: MigrationReport) -> list[tuple[str, str]]:
    """(sentence, what it means): what a user has to know of the old set."""
    hole, masked, left_out = report.hole, report.masked, len(report.quarantined)
    found = []
    if any(triple.mask for triple in report.triples):
        turned = sum(triple.hole_from == "inverted mask" for triple in report.kept)
        meaning = "fluxfill paints where a mask is white, so these masks are turned on the way." if turned else ""
        found.append((_sentence(str(hole)), meaning))
    origins = Counter(triple.hole_from for triple in report.kept)
    found += [(f"{words}: {origins[origin]:,}.", "") for origin, words in _OTHER_HOLES.items() if origins[origin]]
    if any(triple.masked for triple in report.triples):
        meaning = (
            "Pictures with a hole are not needed any more: training rebuilds each from target and mask exactly as "
            "FLUX.1 Fill expects it, with a hole of mid-grey, not of white or black."
            if masked.holes
            else ""
        )
        found.append((_sentence(str(masked)), meaning))
    if report.dry_run:
        found.append(("This was a dry run.", "No dataset was written."))
    elif report.kept:
        found.append((f"What is kept was {_DONE[report.how]} {report.out}.", "Nothing in the old folders was changed."))
    if left_out:
        are = "triple is" if left_out == 1 else "triples are"
        found.append((f"{left_out:,} {are} in quarantine.", "Left out of the dataset, each with its reason below."))
    return [*found, *((_sentence(note), "") for note in report.notes)]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _of_kind(report: MigrationReport, kind: str) -> tuple[list[Problem], list[MigratedTriple]]:
    """The problems of a kind that concern no triple, and the triples that have one."""
    lines = [problem for problem in report.problems if problem.kind == kind]
    return lines, [triple for triple in report.triples if _problems(triple, kind)]


def _problems(triple: MigratedTriple, kind: str) -> list[Problem]:
    return [problem for problem in triple.problems if problem.kind == kind]


def _spread(triples: Sequence[MigratedTriple], count: int) -> list[MigratedTriple]:
    """At most `count` of them, evenly spread."""
    count = min(count, len(triples))
    return [triples[index * len(triples) // count] for index in range(count)]


def _draw(
    triples: Iterable[MigratedTriple], advance: Callable[[int, int], None], max_megapixels: float
) -> dict[str, list[Thumbnail]]:
    """Name -> thumbnails."""
    by_name = {triple.name: triple for triple in triples}
    drawn = {}
    with ThreadPoolExecutor(_THREADS) as threads:
        pictures = threads.map(lambda triple: draw_triple(triple, max_megapixels=max_megapixels), by_name.values())
        for name, thumbnails in zip(by_name, pictures, strict=True):
            drawn[name] = thumbnails
            advance(len(drawn), len(by_name))
    return drawn


def _bars(counts: Sequence[int]) -> list[_Bar]:
    most = max([*counts, 1])
    heights = [_CHART_HEIGHT * count / most for count in counts]
    return [
        _Bar(number * _BAR_STEP, _CHART_HEIGHT - height, height, count, 100 * number // HISTOGRAM_BINS)
        for number, (count, height) in enumerate(zip(counts, heights, strict=True))
    ]


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: printable(value) if type(value) is str else value,  # not Markup, which a macro gave
)
_TEMPLATE = _ENVIRONMENT.get_template("page.html.j2")
