"""Pictures -> triples: target, mask, optional source, caption; from folders, tars or tables alike."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from configs.data_schema import DataConfig
from configs.dataset_schema import DatasetConfig
from data.sources.items import finish_caption
from data.sources.mask_checks import LABELS, SAVE_UPRIGHT, Fault, find_turn, judge
from data.sources.picture_file import PictureFile
from data.sources.problems import MASKS, ORIENTATION, SIZES, Findings
from data.sources.scan import scan_dataset
from data.sources.scan_cache import ScannedItem

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
        return key_of(self.dataset, self.name)


class FoundTriple(NamedTuple):
    """A triple whose pictures can be read. size: upright (width, height).  reach: of its mask, as `measure_reach` gives
    it; None if it has none of its own, or one with which something is wrong already."""

    triple: Triple
    size: tuple[int, int]
    reach: str | None


def key_of(dataset: str, name: str) -> str:
    """The key of the triple of that name in a dataset: see `Triple.key`."""
    stem = _NOT_IN_KEYS.sub("_", name[-48:])
    return f"{stem}-{xxhash.xxh3_64_hexdigest(f'{dataset}/{name}'.encode())}"


def content_of(picture_contents: Iterable[str]) -> str:
    """The hash of a triple's pictures together, from theirs: target, mask, source."""
    return xxhash.xxh3_128_hexdigest("".join(picture_contents).encode())


def list_triples(
    dataset: DatasetConfig,
    data: DataConfig,
    advance: Callable[[int], None],
    findings: Findings,
    *,
    thorough: bool = False,
) -> list[FoundTriple]:
    """The triples of one dataset whose pictures can be read, sorted by name.

    advance, findings, thorough: as `scan_dataset` takes them.
    """
    triples = []
    faults: list[tuple[PictureFile, Fault]] = []
    num_pairs = 0
    found = scan_dataset(dataset, data, advance, findings, thorough=thorough)
    found.reverse()
    while found:  # what is used up is let go: of millions, twice is too much
        scanned = found.pop()
        is_sound = _check(scanned, findings)
        item = scanned.item
        faults += _faults_of(scanned)
        num_pairs += scanned.source is not None
        contents = [info.content for info in scanned.infos]
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
        reach = scanned.mask.reach if scanned.mask is not None and is_sound else None
        triples.append(FoundTriple(triple, (scanned.target.width, scanned.target.height), reach))
    judge(faults, num_pairs, dataset.check_masks, findings)
    return triples


def _faults_of(scanned: ScannedItem) -> list[tuple[PictureFile, Fault]]:
    """What is seen to be wrong with a mask, or with a pair, each at the picture that is to blame."""
    item, mask, fault = scanned.item, scanned.mask, scanned.fault
    if item.mask is None or mask is None:
        return []
    faults = [(item.source if fault.is_of_source and item.source else item.mask, fault)] if fault else []
    of_one_size = (mask.width, mask.height) == (scanned.target.width, scanned.target.height)
    # A source shows whether the mask lies right; without one, EXIF alone tells that it may not.
    doubted = fault.is_of_pair if fault else scanned.source is None
    if of_one_size and doubted and (turn := find_turn(scanned.target.header, mask.header, "mask")):
        return [(item.mask, turn), *((where, other) for where, other in faults if other.is_of_source)]
    return faults


def _check(scanned: ScannedItem, findings: Findings) -> bool:
    """Whether nothing keeps a triple from being used: its pictures are of one size, and its mask has something to paint
    and something to keep. findings: takes what does."""
    item, fits = scanned.item, check_sizes(scanned, findings)
    if scanned.fault and scanned.fault.kind == LABELS:
        return False
    if fits and scanned.mask is not None:
        darkest, brightest = scanned.mask.darkest, scanned.mask.brightest
        if brightest < 128:
            findings.add(
                MASKS,
                item.mask,
                f"the mask is all black (its brightest pixel is {brightest} of 255): nothing to paint",
                "White marks the hole; is it inverted?",
            )
        if darkest >= 128:
            findings.add(
                MASKS,
                item.mask,
                f"the mask is all white (its darkest pixel is {darkest} of 255): nothing to keep",
                "White marks the hole; is it inverted?",
            )
        return darkest < 128 <= brightest
    return fits


def check_sizes(scanned: ScannedItem, findings: Findings) -> bool:
    """Whether the pictures of an item are of one size. findings: takes those that are not of their target's."""
    item, target, fits = scanned.item, scanned.target, True
    for role, file, info in (("mask", item.mask, scanned.mask), ("source", item.source, scanned.source)):
        if info is not None and (info.width, info.height) != (target.width, target.height):
            fits = False
            if turn := find_turn(target.header, info.header, role):
                findings.add(ORIENTATION, file, turn.what, SAVE_UPRIGHT)
                continue
            findings.add(
                SIZES,
                file,
                f"the {role} is {info.width}x{info.height}, its target {item.target} is {target.width}x{target.height}",
                f"Make the {role} at the target's size: stretching it would shift the hole.",
            )
    return fits


def held_out(contents: Iterable[str], count: int) -> frozenset[str]:
    """Content hashes of the held-out pictures: the `count` smallest.

    A picture's split depends on its bytes alone, so copies of it under other names, its repeats and its variants are on
    one side; adding pictures moves as few across as there are new ones among the smallest.
    """
    return frozenset(sorted(set(contents))[:count])
