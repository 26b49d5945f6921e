"""`migrate`: old folders in, a dataset and a report out. Nothing in the old folders is changed."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from configs.data_schema import CaptionsConfig, DataConfig
from configs.errors import InputError, list_problems
from data.migrate.datasets import entries, part_by_kind
from data.migrate.decide import decide
from data.migrate.find import OldTriple, find_in_folders
from data.migrate.look import Look, look_at
from data.migrate.look_cache import LookCache
from data.migrate.names import repeats_of
from data.migrate.old_table import find_in_table
from data.migrate.report import HoleColour, How, MaskedKinds, MigrationReport, OldFolders, write_report
from data.migrate.write import plan_files, refuse_others_files, write_files, write_quarantine
from data.storage.disk_full import FINISHED_IS_KEPT, raise_disk_full

_MOST_OUT_OF_LINE = 0.2  # share of the masks: more are no slips
_LOOKERS = 8  # threads: they wait for disks, and Pillow decodes while others run

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What a user may choose. hole: which colour of the masks is the hole; auto: the pictures tell.  captions: default
    and trigger word, which are written into the captions.  name: of the dataset in the config."""

    how: How = "link"
    dry_run: bool = False
    hole: Literal["auto", "white", "black"] = "auto"
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    max_megapixels: float = DataConfig.model_fields["max_megapixels"].default
    name: str = "migrated"


def migrate(folders: OldFolders, out: Path, options: Options, advance: Advance) -> MigrationReport:
    """Look at the old pictures, decide what they are, write the dataset; report.json last.

    advance: told (stage "look" or "write", how many are done, of how many), from several threads.
    Raises InputError, which lists all that is wrong with what was given: folders that are not there or twice the same,
    no name in common, `out` in one of them. What is wrong with single triples stands in the report.
    """
    _refuse_folders(folders, out)
    refuse_others_files(out)
    limit = options.max_megapixels
    found = find_in_table(folders.target) if folders.target.is_file() else find_in_folders(folders)
    looks = _look_at(
        found.triples, limit, None if options.dry_run else out, _counter(advance, "look", len(found.triples))
    )
    hole, masked, triples = decide(found.triples, looks, options.hole, options.captions)
    triples = part_by_kind(triples)
    kept = [triple for triple in triples if triple.kept]
    targets = Counter(look.contents["target"] for triple, look in zip(triples, looks, strict=True) if triple.kept)
    num_alike = sum(times for times in targets.values() if times > 1)
    report = MigrationReport(
        folders={role: str(folder) for role, folder in folders.by_role.items()},
        out=str(out),
        how=options.how,
        dry_run=options.dry_run,
        hole=hole,
        masked=masked,
        triples=tuple(triples),
        problems=tuple(found.problems),
        orphans=found.orphans,
        repeats={each.name.partition("/")[0]: times for each in found.triples if (times := repeats_of(each.name))},
        datasets=entries(kept, out.absolute(), options.name),
        notes=tuple(_notes(hole, masked, num_alike)),
    )
    if options.dry_run:
        return report
    files = plan_files(triples, [look.contents for look in looks], options.how, max_megapixels=limit)
    with raise_disk_full(out, kept=FINISHED_IS_KEPT):
        num_copies = write_files(out, files, _counter(advance, "write", len(files)))
    if num_copies:
        files_were = "file was" if num_copies == 1 else "files were"
        note = f"{num_copies} {files_were} copied: no hard link leads from {out} to where they are"
        report = replace(report, notes=(*report.notes, note))
    write_quarantine(out, triples)
    write_report(report)
    return report


def _look_at(
    triples: Sequence[OldTriple], max_megapixels: float, out: Path | None, advance: Callable[[], None]
) -> list[Look]:
    """The looks at triples, in their order. out: where looks are kept; None: they are not.  advance: called as each is
    done, by any thread."""
    cache = LookCache(out, max_megapixels) if out is not None else None
    take = partial(look_at, max_megapixels=max_megapixels)

    def look(triple: OldTriple) -> Look:
        found = take(triple) if cache is None else cache.look(triple, take)
        advance()
        return found

    looks: list[Look] = []
    try:
        with ThreadPoolExecutor(_LOOKERS) as pool:
            looks += pool.map(look, triples)
    finally:
        if cache is not None:
            cache.close(complete=len(looks) == len(triples))
    return looks


def _notes(hole: HoleColour, masked: MaskedKinds, num_alike: int) -> Iterator[str]:
    """What a person should know of a set that is not of one kind. num_alike: triples whose target is another's too."""
    if min(hole.white, hole.black) > _MOST_OUT_OF_LINE * (hole.white + hole.black):
        yield (
            f"{hole.white} masks are white in the hole and {hole.black} black: these may be two sets. Migrate each by "
            "itself, with --hole"
        )
    if masked.holes and masked.others:
        yield (
            f"{masked.holes} masked pictures are the target with a hole, {masked.others} show something else there: "
            "each is taken for what it is, in two datasets"
        )
    if num_alike:
        yield (
            f"{num_alike} triples have the same target as another of them, each with a mask, masked picture or caption "
            "of its own: all are kept"
        )


def _refuse_folders(folders: OldFolders, out: Path) -> None:
    """Raise InputError with all that is wrong with the folders as such."""
    problems = []
    seen: dict[Path, str] = {}
    new = out.resolve()
    for role, folder in folders.by_role.items():
        place = folder.resolve()
        if not place.exists():
            problems.append(f"--{role} {folder} does not exist. Check the path.")
        elif not place.is_dir() and (role != "target" or len(folders.by_role) > 1):
            problems.append(f"--{role} {folder} is no folder. Check the path; a table is given as --target alone.")
        elif place in seen:
            problems.append(
                f"--{role} {folder} is the folder of --{seen[place]} too. Give each its own; where one folder holds "
                "all, called a, a_mask and a_masked, give it as --target alone."
            )
        seen.setdefault(place, role)
        if new.is_relative_to(place) or place.is_relative_to(new):
            problems.append(f"--out {out} and --{role} {folder} lie in each other. Choose a folder beside it.")
    if out.exists() and not out.is_dir():
        problems.append(f"--out {out} is a file. Choose a folder.")
    if problems:
        raise InputError(list_problems(problems))


def _counter(advance: Advance, stage: str, total: int) -> Callable[[], None]:
    done = count(1)  # whose next() is one step, for threads too
    return lambda: advance(stage, next(done), total)
