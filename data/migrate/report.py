"""The report of a migration: what was found in the old folders, what was decided, and what became of every triple."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from configs.errors import InputError
from data.sources.problems import Problem
from data.storage.atomic_write import write_text_atomically

REPORT = "report.json"
_VERSION = 1

How = Literal["copy", "link", "reference"]
Colour = Literal["white", "black"]
HoleFrom = Literal["mask", "inverted mask", "alpha", "difference", "none"]
CaptionFrom = Literal["target", "masked", "table", "default", "none"]

HISTOGRAM_BINS = 10  # of the holes' shares of their pictures, from 0 to 1


@dataclass(frozen=True)
class OldFolders:
    """Where the old pictures are, as the user calls it. target: a folder, or a table with columns for all.
    mask, masked: folders, or None: what there is of them lies in the target's, called a_mask, a_M, a_masked or a_F."""

    target: Path
    mask: Path | None = None
    masked: Path | None = None

    @property
    def by_role(self) -> dict[str, Path]:
        """Those that were given, by the option that gave them."""
        return {role: folder for role, folder in vars(self).items() if folder is not None}


@dataclass(frozen=True)
class MigratedTriple:
    """One triple of the old folders, and what becomes of it.

    name: its path below OUT/target, without suffix.  target, mask, masked: old paths.  hole_from: what the hole is read
    from; "none": there is none, and masks are drawn at random.  opaque_target: the target is rewritten without its
    transparent hole, below which the picture is stored.  keeps_source: whether `masked` shows something else in the
    hole, and stays as what the model sees; else it is the target with a hole, which training cuts itself.  caption: as
    it is written, or None.  width, height: of the target, upright, in pixels; 0 where it cannot be read.
    hole_share: of the picture, 0 to 1, or None.  problems: why it is left out, or, of one that is kept, what to look
    at.  kept: False = in quarantine.
    """

    name: str
    target: str
    mask: str | None
    masked: str | None
    hole_from: HoleFrom
    opaque_target: bool
    keeps_source: bool
    caption: str | None
    caption_from: CaptionFrom
    width: int
    height: int
    hole_share: float | None
    problems: tuple[Problem, ...]
    kept: bool


@dataclass(frozen=True)
class HoleColour:
    """Which colour of the old masks is the hole. how: "seen" in the pictures, "given" by the user, "assumed" without
    evidence, or "no masks" to ask it of.  white, black: in how many pairs the pictures speak for each."""

    colour: Colour
    how: Literal["seen", "given", "assumed", "no masks"]
    white: int
    black: int

    def __str__(self) -> str:
        if self.how == "seen":
            return f"{self.colour} is the hole, seen in {getattr(self, self.colour)} of {self.white + self.black} pairs"
        if self.how == "given":
            return f"{self.colour} is the hole, as it was given"
        if self.how == "no masks":
            return "there were no masks"
        return f"{self.colour} is taken for the hole: nothing shows which it is"


@dataclass(frozen=True)
class MaskedKinds:
    """What the masked pictures are, by pairs. holes: the target with a hole, to be cut by training itself.  others:
    another picture in the hole, which is kept as source.  unclear: the same as the target, or not to be told."""

    holes: int
    others: int
    unclear: int

    def __str__(self) -> str:
        total = self.holes + self.others + self.unclear
        parts = []
        if self.holes:
            parts.append(f"{self.holes} of {total} masked pictures are the target with a hole: training cuts it itself")
        if self.others:
            parts.append(f"{self.others} of {total} show another picture in the hole: kept as source")
        if self.unclear:
            parts.append(f"of {self.unclear} it cannot be told")
        return "; ".join(parts) or "there are no masked pictures"


@dataclass(frozen=True)
class MigrationReport:
    """All that a migration found and did.

    folders: role -> old folder.  out: the new one.  problems: what concerns no triple, such as files without a partner.
    orphans: folder -> its files that belong to no triple.  repeats: folder 10_name -> 10.  datasets: entries of
    `data.datasets` for what is kept.  notes: sentences for the user, such as that links became copies.
    """

    folders: dict[str, str]
    out: str
    how: How
    dry_run: bool
    hole: HoleColour
    masked: MaskedKinds
    triples: tuple[MigratedTriple, ...]
    problems: tuple[Problem, ...]
    orphans: dict[str, list[str]]
    repeats: dict[str, int]
    datasets: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> list[MigratedTriple]:
        return [triple for triple in self.triples if triple.kept]

    @property
    def quarantined(self) -> list[MigratedTriple]:
        return [triple for triple in self.triples if not triple.kept]

    @property
    def captions(self) -> dict[str, int]:
        """Where the captions of those that are kept come from -> how many."""
        return dict(Counter(triple.caption_from for triple in self.kept))

    @property
    def hole_histogram(self) -> list[int]:
        """How many of those that are kept have a hole of 0 to 10 % of the picture, of 10 to 20 %, and so on."""
        shares = [triple.hole_share for triple in self.kept if triple.hole_share is not None]
        bins = Counter(min(int(share * HISTOGRAM_BINS), HISTOGRAM_BINS - 1) for share in shares)
        return [bins[index] for index in range(HISTOGRAM_BINS)]


def to_json(report: MigrationReport) -> str:
    """The report as text; its figures stand in front, for people and programs that want no more."""
    counts = {
        "triples": len(report.triples),
        "kept": len(report.kept),
        "quarantined": len(report.quarantined),
        "captions": report.captions,
        "hole_histogram": report.hole_histogram,
        "problems": _count_kinds([*report.problems, *(p for triple in report.triples for p in triple.problems)]),
    }
    said = {"hole": str(report.hole), "masked": str(report.masked)}
    record = {"version": _VERSION, "counts": counts, "said": said} | asdict(report)
    return json.dumps(record | {"triples": [_record(triple) for triple in report.triples]}, indent=1) + "\n"


def from_json(text: str, name: object) -> MigrationReport:
    """The report of a text. name: how messages call it.  Raises InputError if it is none, or of another version."""
    try:
        record = json.loads(text)
        if record.pop("version") != _VERSION:
            raise ValueError("it is of another version of fluxfill")
        del record["counts"], record["said"]
        triples = [
            MigratedTriple(**triple | {"problems": tuple(Problem(**problem) for problem in triple["problems"])})
            for triple in record.pop("triples")
        ]
        problems = tuple(Problem(*problem) for problem in record.pop("problems"))
        hole, masked = HoleColour(**record.pop("hole")), MaskedKinds(**record.pop("masked"))
        notes = tuple(record.pop("notes"))
        return MigrationReport(
            hole=hole, masked=masked, triples=tuple(triples), problems=problems, notes=notes, **record
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name}: no report of a migration ({error}). Run `fluxfill migrate` again.") from error


def write_report(report: MigrationReport) -> Path:
    """Write OUT/report.json: the last file of a migration. Returns its path."""
    path = Path(report.out) / REPORT
    write_text_atomically(path, to_json(report))
    return path


def read_report(path: Path) -> MigrationReport:
    """The report in a file. Raises InputError if it cannot be read, or is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Run `fluxfill migrate` again.") from error
    return from_json(text, path)


def _record(triple: MigratedTriple) -> dict[str, Any]:
    return vars(triple) | {"problems": [problem._asdict() for problem in triple.problems]}


def _count_kinds(problems: Sequence[Problem]) -> dict[str, int]:
    return dict(Counter(problem.kind for problem in problems))
