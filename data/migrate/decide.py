"""What an old set is, by the votes of its pairs: which colour is the hole, what the masked pictures are, which triples
can be used."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from configs.data_schema import CaptionsConfig
from data.migrate.find import OldTriple
from data.migrate.holes import Shown
from data.migrate.look import Look
from data.migrate.report import Colour, HoleColour, MaskedKinds, MigratedTriple
from data.sources.items import OWN, finish_caption, whose_caption
from data.sources.likeness import ANOTHER, TURNED_SOURCE
from data.sources.mask_checks import LABELS, NO_MASK, SAVE_UPRIGHT, TURNED, Fault, look_swapped_by_accident
from data.sources.mask_fit import ELSEWHERE, INVERTED, SAME, SWAPPED
from data.sources.problems import DUPLICATES, MASKS, MISPLACED, ORIENTATION, POLARITY, SOURCES, Problem

# kind of fault -> what it is listed under, and what to do
_CURES = {
    LABELS: (MASKS, "Save it in black and white: the hole in one, all else in the other."),
    NO_MASK: (MASKS, "Give a mask of black and white. Does --mask name the folder of the pictures?"),
    INVERTED: (
        POLARITY,
        "Invert it; if it is right and most others are not, say with --hole which colour is the hole.",
    ),
    ELSEWHERE: (MISPLACED, "Make the mask from this pair. Without --mask all are made from their pairs."),
    SAME: (SOURCES, "Give the masked picture, and the target without the hole."),
    SWAPPED: (SOURCES, "Exchange these two, or --target and --masked if it is so in all."),
    ANOTHER: (SOURCES, "Give the masked picture of this target. Do the names of the two match?"),
    TURNED_SOURCE: (ORIENTATION, SAVE_UPRIGHT),
    TURNED: (ORIENTATION, SAVE_UPRIGHT),
}
_CALLED = {"mask": "mask", "masked": "masked picture"}
_UNTOUCHED = "No harm: the target is used, and training cuts the hole."


# What a masked picture is. exchanged: the target, which has the hole in its place.
_Kind = Literal["cut out", "a picture", "exchanged"]


class Decided(NamedTuple):
    """hole, masked: of the set.  triples: in the order of their names."""

    hole: HoleColour
    masked: MaskedKinds
    triples: list[MigratedTriple]


class _Set(NamedTuple):
    """What is true of a set, by which its triples are judged. others: most masked pictures show another picture.
    swapped: so many pairs look exchanged that they are.  opaque: of some targets, a transparent part is the hole."""

    hole: HoleColour
    others: bool
    swapped: bool
    opaque: bool


def decide(
    triples: Sequence[OldTriple],
    looks: Sequence[Look],
    given: Literal["auto", "white", "black"],
    captions: CaptionsConfig,
) -> Decided:
    """What becomes of every triple. given: the colour of the hole, if the user says it."""
    hole = _decide_colour(looks, given)
    kinds, others = _tell_kinds(looks, hole.colour)
    num_swapped = sum((fault := look.faults.get(hole.colour)) is not None and fault.kind == SWAPPED for look in looks)
    of_set = _Set(
        hole,
        others,
        swapped=not look_swapped_by_accident(num_swapped, sum(bool(look.faults) for look in looks)),
        opaque=any(look.opaque_target for look in looks),
    )
    decided = [_decide(*each, of_set, captions) for each in zip(triples, looks, kinds, strict=True)]
    num_masked = sum(triple.masked is not None for triple in triples)
    holes, pictures = kinds.count("cut out"), kinds.count("a picture")
    masked = MaskedKinds(holes, pictures, num_masked - holes - pictures)
    return Decided(hole, masked, _leave_out_duplicates(decided, looks))


def _decide_colour(looks: Sequence[Look], given: Literal["auto", "white", "black"]) -> HoleColour:
    """By the pairs that fit their mask if one colour is the hole, and are the other way round if the other is."""
    votes: Counter[str] = Counter()
    for look in looks:
        kinds = {colour: fault and fault.kind for colour, fault in look.faults.items()}
        if INVERTED in kinds.values():
            votes.update(colour for colour, kind in kinds.items() if kind in (None, SWAPPED))
    white, black = votes["white"], votes["black"]
    if given != "auto":
        return HoleColour(given, "given", white, black)
    if not any(look.hole_from == "mask" for look in looks):
        return HoleColour("white", "no masks", white, black)
    return HoleColour("black" if black > white else "white", "seen" if votes else "assumed", white, black)


def _tell_kinds(looks: Sequence[Look], colour: Colour) -> tuple[list[_Kind | None], bool]:
    """The kind of each masked picture, None if there is none or it does not fit its mask; and whether most are other
    pictures. One that could be either is what most are; a target may have the hole cut out only where that is usual."""
    kinds: list[Shown | _Kind | None] = []
    for look in looks:
        contents = look.shown.get(colour if look.hole_from == "mask" else "white")
        fault = look.faults.get(colour)
        if contents is None or (fault is not None and fault.kind != SWAPPED):  # which may be by accident
            kinds.append(None)
        else:
            kinds.append("exchanged" if contents.are_exchanged else contents.masked)
    others = kinds.count("a picture") > kinds.count("cut out") + kinds.count("exchanged")
    settled: dict[Shown | _Kind | None, _Kind | None] = {
        "unsure": "a picture" if others else "cut out",
        "exchanged": "a picture" if others else "exchanged",
        "a picture": "a picture",
        "cut out": "cut out",
        None: None,
    }
    return [settled[kind] for kind in kinds], others


def _decide(
    triple: OldTriple, look: Look, kind: _Kind | None, of_set: _Set, captions: CaptionsConfig
) -> MigratedTriple:
    problems, notes = _judge(triple, look, kind, of_set)
    keeps_source = kind == "a picture" and triple.masked is not None
    inverted = look.hole_from == "mask" and of_set.hole.colour == "black"
    share = look.white_share
    caption = finish_caption(triple.caption, captions)
    whose = whose_caption(caption, captions) if triple.caption_from != "none" else None
    return MigratedTriple(
        name=triple.name,
        target=str(triple.target),
        mask=str(triple.mask) if triple.mask else None,
        masked=str(triple.masked) if triple.masked else None,
        hole_from="inverted mask" if inverted else look.hole_from,
        opaque_target=look.opaque_target,
        keeps_source=keeps_source,
        caption=caption or None,
        caption_from=triple.caption_from if whose == OWN else "default" if captions.default.strip() else "none",
        width=look.width,
        height=look.height,
        hole_share=1 - share if inverted and share is not None else share,
        problems=(*problems, *notes),
        kept=not problems,
    )


def _judge(triple: OldTriple, look: Look, kind: _Kind | None, of_set: _Set) -> tuple[list[Problem], list[Problem]]:
    """Why a triple cannot be used, and, of one that can, what a person may want to look at."""
    problems = [*triple.problems, *look.problems]
    notes: list[Problem] = []
    if triple.no_masked:
        if of_set.others or look.hole_from == "none":
            problems.append(triple.no_masked)
        else:
            notes.append(triple.no_masked._replace(cure=_UNTOUCHED))
    if problems:
        return problems, []
    if look.is_bare:
        what = "part of it is transparent, and nothing is stored below"
        if of_set.opaque:
            return [Problem(MASKS, str(triple.target), f"{what}: what was in the hole is lost", "Restore it.")], []
        notes.append(Problem(MASKS, str(triple.target), what, "That part is trained as white."))
    if look.hole_from != "mask":
        return [], notes
    if look.white_share in (0.0, 1.0) and not look.fault_of_mask:
        return [_blank(triple, look, of_set.hole.colour)], []
    fault = look.fault_of_mask or look.faults.get(of_set.hole.colour)
    if kind == "exchanged":
        fault = Fault(SWAPPED, "the hole is cut out of the target, and the masked picture has none")
    elif fault is not None and fault.kind == SWAPPED and not of_set.swapped:
        fault = None
    if fault.is_of_pair if fault else triple.masked is None:
        fault = look.turn or fault
    if fault is None:
        return [], notes
    if fault.kind == SAME and not of_set.others:
        what = "is the same picture as its target, though the mask has a hole"
        contents = look.shown.get(of_set.hole.colour)
        if contents is None or contents.masked != "cut out":
            return [], [*notes, Problem(SOURCES, str(triple.masked), what, _UNTOUCHED)]
        fault = Fault(SAME, f"{what}, and both have it cut out: nothing is left of what was there")
    return [_problem_of(fault, triple, of_set.hole)], []


def _blank(triple: OldTriple, look: Look, hole: Colour) -> Problem:
    colour = "white" if look.white_share else "black"
    what = "nothing is left to keep" if colour == hole else "there is no hole"
    return Problem(MASKS, str(triple.mask), f"the mask is all {colour}: {what}", "Draw the hole, or remove the triple.")


def _problem_of(fault: Fault, triple: OldTriple, hole: HoleColour) -> Problem:
    kind, cure = _CURES[fault.kind]
    what = fault.what
    if fault.kind == INVERTED:
        others, pairs = getattr(hole, hole.colour), hole.white + hole.black
        what = f"the mask is the other way round than {others} of {pairs}: {hole.colour} is not its hole"
    return Problem(kind, str(triple.masked if fault.is_of_source else triple.mask), what, cure)


def _leave_out_duplicates(triples: Sequence[MigratedTriple], looks: Sequence[Look]) -> list[MigratedTriple]:
    """Of triples whose pictures all have the same bytes, with targets in several files, the first is kept.

    Not of those with the same target alone: of a room that was photographed once, each object that was in it makes a
    triple, with its own copy of the empty room.
    """
    first: dict[frozenset[tuple[str, str]], MigratedTriple] = {}
    left = []
    for triple, look in zip(triples, looks, strict=True):
        same = first.setdefault(frozenset(look.contents.items()), triple) if triple.kept else triple
        if same.target != triple.target:
            others = " and ".join(_CALLED[role] for role in look.contents if role in _CALLED)
            what = f"is the same picture as {same.target}{f', with the same {others}' if others else ''}"
            problem = Problem(DUPLICATES, triple.target, what, "Keep one of them.")
            triple = replace(triple, kept=False, problems=(problem, *triple.problems))
        left.append(triple)
    return left
