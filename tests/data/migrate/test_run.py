import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.data_schema import CaptionsConfig
from configs.errors import InputError
from configs.loading import load_config
from data.migrate.report import REPORT, OldFolders, read_report
from data.migrate.run import Options, migrate
from data.sources.problems import Findings
from data.sources.triples import list_triples
from tests.data.migrate.made_old_pairs import save_triples
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[3]

KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from data.migrate.report import OldFolders
from data.migrate.run import Options, migrate

def advance(stage, done, total):
    if (stage, done) == (sys.argv[6], int(sys.argv[7])):
        os.kill(os.getpid(), signal.SIGKILL)

target, mask, masked, out = map(Path, sys.argv[1:5])
migrate(OldFolders(target, mask, masked), out, Options(how=sys.argv[5]), advance)
"""


def folders_of(planted):
    return OldFolders(planted.target, planted.mask, planted.masked)


def run(folders, out, **options):
    return migrate(folders, out, Options(**options), lambda *_: None)


def contents_of(folder, *, without=()):
    """Path -> bytes, or where a symbolic link leads."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in without
    }


def state_of(*folders):
    """Bytes, mode and time of every file."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) for path in files}


def old_name(triple):
    """Its name without the folder of its kind."""
    return triple.name.removeprefix("with_mask/").removeprefix("with_source/")


@pytest.mark.parametrize("colour", ["white", "black"])
def test_every_planted_fault_is_found_and_nothing_else(planted, planted_black, tmp_path, colour):
    old = planted if colour == "white" else planted_black
    report = run(folders_of(old), tmp_path / "new", dry_run=True)
    assert (report.hole.colour, report.hole.how) == (colour, "seen")
    assert {old_name(triple): triple.problems[0].kind for triple in report.quarantined} == old.faults
    assert {old_name(triple) for triple in report.kept} == old.good
    assert {old_name(each): each.problems[0].kind for each in report.kept if each.problems} == old.notes
    assert {old_name(triple) for triple in report.kept if triple.keeps_source} == old.sources
    assert {name for names in report.orphans.values() for name in names} == old.orphans
    assert all(problem.cure for triple in report.quarantined for problem in triple.problems)
    assert len(report.notes) == 1 and "in two datasets" in report.notes[0]


@pytest.mark.fault(29, "a whole migration, by links and copies")
@pytest.mark.parametrize("how", ["copy", "link", "reference"])
def test_nothing_old_changes_and_what_is_new_is_taken_by_a_scan(planted, tmp_path, how):
    old = (planted.target, planted.mask, planted.masked)
    before = state_of(*old)
    report = run(folders_of(planted), tmp_path / "new", how=how)
    assert state_of(*old) == before
    assert read_report(tmp_path / "new" / REPORT) == report

    overrides = [f"data.cache={tmp_path / 'cache'}", f"data.datasets={report.datasets}"]
    data = load_config(ROOT / "configs" / "demo.yaml", overrides).data
    findings, found = Findings(), []
    for dataset in data.datasets:
        found += [each.triple for each in list_triples(dataset, data, lambda _: None, findings)]
    assert (findings.problems, findings.notes) == ([], [])
    assert len(found) == len(report.kept) == len(planted.good)
    assert Counter(triple.source is not None for triple in found)[True] == len(planted.sources)
    assert sum(triple.caption != "" for triple in found) == sum(each.caption is not None for each in report.kept)
    one = next((tmp_path / "new" / "target").rglob("astronaut_00.jpg"))
    assert one.is_symlink() == (how == "reference")
    assert os.path.samefile(one, planted.target / "astronaut_00.jpg") == (how != "copy")


def test_masks_that_are_black_in_the_hole_are_written_white(planted, planted_black, tmp_path):
    run(folders_of(planted), tmp_path / "white")
    run(folders_of(planted_black), tmp_path / "black", how="reference")
    masks = sorted(path.relative_to(tmp_path / "black") for path in (tmp_path / "black" / "mask").rglob("*.*"))
    assert len(masks) == len(planted.good)
    for path in masks:
        white, black = (next((tmp_path / name / path).parent.glob(f"{path.stem}.*")) for name in ("white", "black"))
        assert (np.asarray(Image.open(white)) == np.asarray(Image.open(black))).all()


@pytest.mark.fault(29, "kill -9 at every file")
@pytest.mark.parametrize(
    "how, stage, number",
    [("copy", "look", 11), ("copy", "write", 1), ("link", "write", 17), ("reference", "write", 40)],
)
def test_a_run_that_is_killed_at_any_file_is_finished_by_the_next(planted, tmp_path, how, stage, number):
    folders, out = folders_of(planted), tmp_path / "new"
    run(folders, out, how=how)
    expected = contents_of(out)
    os.rename(out, tmp_path / "expected")
    command = [sys.executable, "-c", KILLED_RUN, *map(str, folders.by_role.values()), str(out), how, stage, str(number)]
    assert subprocess.run(command, cwd=ROOT, timeout=PATIENCE, check=False).returncode == -9
    assert not (out / REPORT).exists()
    run(folders, out, how=how)
    assert contents_of(out) == expected


@pytest.mark.fault(29, "a real small disk that fills up while pictures are copied")
def test_a_full_disk_is_told_and_with_room_the_same_run_finishes(planted, tmp_path, small_disk):
    folders, out = folders_of(planted), small_disk.folder / "new"
    run(folders, tmp_path / "expected", how="copy")
    old = contents_of(planted.target.parent)
    with small_disk.with_room_for(100 << 10), pytest.raises(InputError, match=r"cannot be written .*Make room and run"):
        run(folders, out, how="copy")
    assert not (out / REPORT).exists()
    run(folders, out, how="copy")
    assert contents_of(out, without={REPORT}) == contents_of(tmp_path / "expected", without={REPORT})  # names OUT
    assert contents_of(planted.target.parent) == old


def test_a_second_run_takes_away_what_no_longer_belongs_and_nothing_of_the_users(tmp_path):
    old, out = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    save_triples(old, 4)
    folders = OldFolders(old)
    run(folders, out)
    assert len(list((out / "target").iterdir())) == 4
    kept = out / "target" / "000.jpg"
    (out / "target" / "000.txt").write_text("a caption of the user's own")
    (out / "notes.txt").write_text("the user's")
    written = kept.stat().st_mtime_ns
    for role in ("target.jpg", "mask.png", "masked.jpg"):
        (old / f"001_{role}").unlink()
    (old / "002_target.txt").write_text("a sofa")
    run(folders, out, captions=CaptionsConfig(default="a room"))
    names = {path.name for path in (out / "target").iterdir()}
    assert names == {"000.jpg", "000.txt", "002.jpg", "002.txt", "003.jpg", "003.txt"}
    assert (out / "target" / "000.txt").read_text() == "a caption of the user's own"
    assert (out / "target" / "003.txt").read_text() == "a room\n"
    assert (out / "notes.txt").exists() and kept.stat().st_mtime_ns == written
    run(folders, out, how="reference")
    assert kept.is_symlink() and not (out / "target" / "003.txt").exists()


def test_pictures_in_the_new_folder_that_no_migration_wrote_are_refused(tmp_path):
    (tmp_path / "old").mkdir()
    save_triples(tmp_path / "old", 2)
    mine = tmp_path / "new" / "target" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds 1 file that no migration wrote: target/mine\.png"):
        run(OldFolders(tmp_path / "old"), tmp_path / "new")
    assert mine.read_bytes() == b"mine"


def test_a_dry_run_writes_nothing(planted, tmp_path):
    report = run(folders_of(planted), tmp_path / "new", dry_run=True)
    assert not (tmp_path / "new").exists()
    assert report.datasets[0]["target"] == str(tmp_path / "new" / "target" / "with_mask")


def test_all_that_is_wrong_with_the_folders_is_said_at_once(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError) as caught:
        run(OldFolders(tmp_path / "a", tmp_path / "a", tmp_path / "none"), tmp_path / "a" / "new")
    text = str(caught.value)
    assert f"--mask {tmp_path / 'a'} is the folder of --target too" in text
    assert f"--masked {tmp_path / 'none'} does not exist" in text
    assert f"--out {tmp_path / 'a' / 'new'} and --target {tmp_path / 'a'} lie in each other" in text
    with pytest.raises(InputError, match="lie in each other"):
        run(OldFolders(tmp_path / "a"), tmp_path)


def test_progress_reaches_the_end_of_each_stage(tmp_path):
    (tmp_path / "old").mkdir()
    save_triples(tmp_path / "old", 3)
    told = []
    migrate(OldFolders(tmp_path / "old"), tmp_path / "new", Options(), lambda *each: told.append(each))
    assert sorted(told) == [("look", n, 3) for n in (1, 2, 3)] + [("write", n, 6) for n in range(1, 7)]


def test_that_triples_share_a_target_is_said_once_and_not_of_duplicates(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    save_triples(old, 3)
    for role in ("target.jpg", "mask.jpg", "masked.jpg"):
        (old / f"copy_{role}").write_bytes((old / f"000_{role}").read_bytes())
    assert run(OldFolders(old), tmp_path / "new").notes == ()
    with Image.open(old / "copy_mask.jpg") as mask:
        mask.rotate(180).save(old / "copy_mask.jpg")
    (old / "copy_masked.jpg").unlink()
    report = run(OldFolders(old), tmp_path / "new")
    assert len(report.kept) == 4
    assert [note.partition(",")[0] for note in report.notes] == ["2 triples have the same target as another of them"]
