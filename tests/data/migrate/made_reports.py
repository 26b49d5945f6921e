"""Reports of migrations that never were, on real files: for what only shows a report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.migrate.report import HoleColour, MaskedKinds, MigratedTriple, MigrationReport
from data.sources.problems import MASKS, NAMES, SIZES, UNREADABLE, Problem

SIDE = 160
HOLE = (40, 60, 120, 100)  # left, top, right, bottom


def make_triple(folder: Path, name: str, **changes: Any) -> MigratedTriple:
    """A good triple with its files: a coloured target with a hole, white in the mask; `masked` has it painted blue."""
    paths = {role: folder / role / f"{name}.png" for role in ("target", "mask", "masked")}
    noise = np.random.default_rng(len(name)).integers(60, 196, (4, 4, 3), dtype=np.uint8)
    target = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    mask, masked = Image.new("L", target.size), target.copy()
    mask.paste(255, HOLE)
    masked.paste((0, 0, 255), HOLE)
    for path, picture in zip(paths.values(), (target, mask, masked), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    triple = MigratedTriple(
        name=name,
        target=str(paths["target"]),
        mask=str(paths["mask"]),
        masked=str(paths["masked"]),
        hole_from="mask",
        opaque_target=False,
        keeps_source=False,
        caption=f"a picture called {name}",
        caption_from="target",
        width=SIDE,
        height=SIDE,
        hole_share=0.125,
        problems=(),
        kept=True,
    )
    return replace(triple, **changes)


def make_report(out: Path, triples: Sequence[MigratedTriple], **changes: Any) -> MigrationReport:
    """A report of them."""
    folders = {role: f"old/{role}" for role in ("target", "mask", "masked")}
    report = MigrationReport(
        folders=folders,
        out=str(out),
        how="link",
        dry_run=False,
        hole=HoleColour("white", "seen", len(triples), 0),
        masked=MaskedKinds(len(triples), 0, 0),
        triples=tuple(triples),
        problems=(),
        orphans={},
        repeats={},
        datasets=[{"name": "migrated", "target": "new/target", "mask": "new/mask"}],
    )
    return replace(report, **changes)


def make_faulty_report(folder: Path) -> MigrationReport:
    """Four good triples, one to look at, and three in quarantine, whose files are as bad as the report says."""
    good = [make_triple(folder, f"photo-{number}") for number in range(3)]
    good.append(make_triple(folder, "removal", keeps_source=True))
    copy = make_triple(folder, "copy", problems=(Problem(NAMES, "old/copy.png", "is photo-1 again", "Remove one."),))
    broken = make_triple(folder, "broken", kept=False, width=0, height=0, hole_share=None)
    Path(broken.target).write_bytes(b"no picture")
    blank = make_triple(folder, "blank", kept=False, hole_share=0.0)
    Image.new("L", (SIDE, SIDE)).save(blank.mask or "")
    small = make_triple(folder, "small", kept=False)
    Image.new("L", (SIDE // 2, SIDE // 2), 255).save(small.mask or "")
    broken = replace(broken, problems=(Problem(UNREADABLE, broken.target, "not a picture", "Restore it."),))
    blank = replace(blank, problems=(Problem(MASKS, str(blank.mask), "the mask is all black", "Paint it."),))
    small = replace(small, problems=(Problem(SIZES, str(small.mask), "the mask is 80x80", "Make it larger."),))
    return make_report(
        folder / "new",
        [*good, copy, broken, blank, small],
        problems=(Problem(NAMES, "old/mask/lost.png", "belongs to no target", "Add its target."),),
        orphans={"old/mask": ["lost.png"]},
        notes=("Two files became copies.",),
    )
