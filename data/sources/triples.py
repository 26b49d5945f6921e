"""Pictures -> triples: target, mask, optional source, caption; from folders, tars or tables alike."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import xxhash

from configs.data_schema import DataConfig
from configs.dataset_schema import DatasetConfig
from configs.errors import InputError, list_problems
from data.sources.items import finish_caption
from data.sources.mask_checks import LABELS, Fault, find_turn, stop_run
from data.sources.picture_file import PictureFile
from data.sources.scan import ScannedItem, scan_dataset

_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True, slots=True)
class Triple:
    """One training item as files.

    dataset: its dataset's name.  name: its own there; of a target in a folder, the path without suffix ("a/b/cat").
    target, mask: pictures of one size; no mask where masks are random.  source: what the model sees instead of the
    target, or None.  caption: the text, trigger word included.  target_content: hash of the target's bytes, 32 hex
    digits.  content: hash of the bytes of all its pictures, in which any change shows.
    """

    dataset: str
    name: str
    target: PictureFile
    mask: PictureFile | None
    source: PictureFile | None
    caption: str
    target_content: str
    content: str

    @property
    def key(self) -> str:
        """Name inside a shard: letters, digits, - and _ only, at most 70 long, with a hash of the whole name (stems
        collide, and webdataset cuts names at the first dot)."""
        stem = _NOT_IN_KEYS.sub("_", self.name[-48:])
        return f"{stem}-{xxhash.xxh3_64_hexdigest(f'{self.dataset}/{self.name}'.encode())}"


def content_of(picture_contents: Iterable[str]) -> str:
    """The hash of a triple's pictures together, from theirs: target, mask, source."""
    return xxhash.xxh3_128_hexdigest("".join(picture_contents).encode())


def list_triples(
    dataset: DatasetConfig, data: DataConfig, advance: Callable[[int], None], warn: Callable[[str], object] = print
) -> list[tuple[Triple, tuple[int, int]]]:
    """All triples of one dataset with their upright (width, height), sorted by name; each is checked to be whole.

    advance: told how many more were read.  warn: told of masks that look wrong, where they stop nothing.  Raises one
    InputError that lists every triple at fault.
    """
    triples, problems = [], []
    faults: list[tuple[PictureFile, Fault]] = []
    num_pairs = 0
    found = scan_dataset(dataset, data, advance)
    found.reverse()
    while found:  # what is used up is let go: of millions, twice is too much
        scanned = found.pop()
        problems += _problems_of(scanned)
        faults += _faults_of(scanned)
        num_pairs += scanned.source is not None
        item = scanned.item
        contents = scanned.contents
        triple = Triple(
            dataset.name,
            item.name,
            item.target,
            item.mask,
            item.source,
            finish_caption(item.caption, data.captions),
            contents[0],
            content_of(contents),
        )
        triples.append((triple, (scanned.target.width, scanned.target.height)))
    of_pairs = sum(fault.is_of_pair for _, fault in faults)
    if dataset.check_masks != "off":
        for where, fault in faults:
            stops = stop_run(fault, num_of_pairs=of_pairs, num_pairs=num_pairs, policy=dataset.check_masks)
            tell = problems.append if stops else warn
            tell(f"{where}: {fault.what}. {fault.cure}")
    if problems:
        raise InputError(list_problems(problems))
    return triples


def _faults_of(scanned: ScannedItem) -> list[tuple[PictureFile, Fault]]:
    """What is wrong with its mask, or its pair of source and target, and the picture to which that is to blame."""
    item, mask, fault = scanned.item, scanned.mask, scanned.fault
    if item.mask is None or mask is None:
        return []
    of_one_size = (mask.width, mask.height) == (scanned.target.width, scanned.target.height)
    # Where a source shows that the mask lies right, it was made of the upright target.
    if of_one_size and (fault.is_of_pair if fault else scanned.source is None):
        fault = find_turn(scanned.target.header, mask.header, "mask") or fault
    if fault is None:
        return []
    return [(item.source if fault.is_of_source and item.source else item.mask, fault)]


def _problems_of(scanned: ScannedItem) -> list[str]:
    """What keeps a triple from being used: its pictures differ in size, or its mask has nothing to paint or to keep."""
    item, target, problems = scanned.item, scanned.target, []
    for role, file, facts in (("mask", item.mask, scanned.mask), ("source", item.source, scanned.source)):
        if facts is not None and (facts.width, facts.height) != (target.width, target.height):
            turn = find_turn(target.header, facts.header, role)
            problems.append(
                f"{file}: {turn.what}. {turn.cure}"
                if turn
                else f"{file}: the {role} is {facts.width}x{facts.height}, its target {item.target} is "
                f"{target.width}x{target.height}. Make the {role} anew at the target's size: stretching it would shift "
                "the hole."
            )
    if not problems and scanned.mask is not None and not (scanned.fault and scanned.fault.kind == LABELS):
        darkest, brightest = scanned.mask.darkest, scanned.mask.brightest
        if brightest < 128:
            problems.append(
                f"{item.mask}: the mask is all black (its brightest pixel is {brightest} of 255): nothing to paint. "
                "White marks the hole; is it inverted?"
            )
        if darkest >= 128:
            problems.append(
                f"{item.mask}: the mask is all white (its darkest pixel is {darkest} of 255): nothing to keep. "
                "White marks the hole; is it inverted?"
            )
    return problems


def held_out(contents: Iterable[str], count: int) -> frozenset[str]:
    """Content hashes of the held-out pictures: the `count` smallest.

    A picture's split hangs on its bytes alone, so copies of it under other names, its repeats and its variants are on
    one side; adding pictures moves as few across as there are new ones among the smallest.
    """
    return frozenset(sorted(set(contents))[:count])
