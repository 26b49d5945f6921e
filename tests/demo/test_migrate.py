"""The move of an old set-up as a user makes it: every step a process of its own, below folders with Chinese names and
spaces."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.loading import load_config
from data.migrate.report import REPORT, MigrationReport, read_report
from data.sources.problems import MASKS
from demo.migrate import OLD_CODE, ROOT, SMALL, edit_paths, judged_otherwise
from demo.old_folders import Planted, make_old_folders

CONFIG, SCRIPT = "train_flux_inpainting.yaml", "migrate_your_data.py"
FLUXFILL = (sys.executable, "-m", "launch")


def run(*command: object, cwd: Path, code: int = 0) -> str:
    """What a command prints, both streams together."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def files_of(*folders: Path) -> dict[Path, tuple[bytes, int]]:
    """Bytes and time of every file."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def assert_all_is_found(found: MigrationReport, printed: str, planted: Planted) -> None:
    """Every planted fault is told in full, at a file of its triple; what is good is kept, and said to be good but for
    what was planted."""
    assert judged_otherwise(found, planted) == set()
    first = min(planted.good)
    assert judged_otherwise(found, replace(planted, faults=planted.faults | {first: MASKS})) == {first}
    for triple in found.quarantined:
        assert triple.name[-3:] in Path(triple.problems[0].where).name  # _07
        assert all(f"  {problem}\n" in printed and problem.cure for problem in triple.problems)
    assert {name for names in found.orphans.values() for name in names} == planted.orphans
    noted = {triple.name.partition("/")[2]: triple.problems[0].kind for triple in found.kept if triple.problems}
    assert noted == planted.notes
    sources = {triple.name for triple in found.kept if triple.keeps_source}
    assert sources == {f"with_source/{name}" for name in planted.sources}


@pytest.mark.parametrize("hole", ["white", "black"])
def test_three_paths_make_a_dataset_of_what_is_good_and_name_what_is_not(tmp_path: Path, hole: str) -> None:
    planted = make_old_folders(tmp_path / "旧 图片", white_is_hole=hole == "white")
    before = files_of(planted.target.parent)
    quickstart = (*FLUXFILL, "quickstart", "--gpu_memory", "80GB", "--num_gpus", "2", "--out", "新 训练")
    run(*quickstart, cwd=tmp_path)
    folder = tmp_path / "新 训练"
    assert "still has the example's paths" in run(sys.executable, folder / SCRIPT, cwd=tmp_path, code=2)
    assert len(edit_paths(folder / SCRIPT, planted)) == 3
    printed = run(sys.executable, folder / SCRIPT, cwd=tmp_path)

    found = read_report(folder / "dataset" / REPORT)
    assert f"{hole} is the hole, seen in" in printed
    assert_all_is_found(found, printed, planted)
    assert files_of(planted.target.parent) == before
    datasets = load_config(folder / CONFIG).data.datasets
    assert [dataset.name for dataset in datasets] == ["migrated-with_mask", "migrated-with_source"]
    masks = [path for dataset in datasets for path in Path(str(dataset.mask)).rglob("*.*")]
    assert len(masks) == len(planted.good)

    made = files_of(folder)
    assert "has the datasets already" in run(sys.executable, folder / SCRIPT, cwd=tmp_path)
    again = files_of(folder)
    assert {path for path in made.keys() | again.keys() if made.get(path) != again.get(path)} <= {
        folder / "dataset" / name
        for name in (REPORT, "report.html", "files.json", "looks.jsonl", "quarantine/list.jsonl")
    }
    kept = run(*quickstart, cwd=tmp_path)
    assert all(f"{name}: kept as you edited it." in kept for name in (CONFIG, SCRIPT))
    assert files_of(folder)[folder / CONFIG] == made[folder / CONFIG]


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    said = run(sys.executable, ROOT / "demo" / "migrate.py", "--folder", "mine", cwd=tmp_path, code=2)
    assert "--folder mine is there already" in said and list((tmp_path / "mine").iterdir()) == []


@pytest.mark.slow
def test_the_walk_ends_with_a_checkpoint_and_pictures_and_every_step_can_be_typed_again(tmp_path: Path) -> None:
    place = tmp_path / "旧 数据"
    said = run(sys.executable, ROOT / "demo" / "migrate.py", "--folder", place, "--steps", "4", cwd=tmp_path)
    planted = make_old_folders(tmp_path / "the same")
    folder, trained = place / "flux-inpainting", place / "flux-inpainting" / "runs" / "flux_inpainting"
    found = read_report(folder / "dataset" / REPORT)
    assert_all_is_found(found, said, planted)
    assert f"All {len(planted.faults)} planted faults were found" in said

    checks = dict(re.findall(r"^(?:ok|warning|error|skipped) +([a-z]+)  +(.*)$", said, re.MULTILINE))
    trained_on, held = re.fullmatch(r"(\d+) can be trained on: .*; (\d+) are held out", checks["pictures"]).groups()
    assert int(trained_on) + int(held) == len(planted.good)
    assert checks["steps"].startswith("2 steps, ")
    assert re.search(rf"^{CONFIG}: (?:all is right|\d+ warnings?)$", said, re.MULTILINE)

    assert (trained / "checkpoints" / "step-00000004" / "COMPLETE").is_file()
    assert (trained / "final" / "pytorch_lora_weights.safetensors").is_file()
    for split in ("train", "holdout"):
        with Image.open(trained / "samples" / f"step-00000004-{split}.png") as sheet:
            assert np.asarray(sheet.convert("L")).std() > 20
    for path in (folder / "dataset" / "report.html", trained / "samples" / "step-00000004-train.png"):
        assert path.is_file() and f"  {path.as_uri()}\n" in said

    before = files_of(folder / "dataset" / "target", folder / "dataset" / "mask", folder / "cache")
    assert "has the datasets already" in run(sys.executable, SCRIPT, cwd=folder)
    log = run("./start_training.sh", *SMALL, "train.steps=6", cwd=folder)
    assert re.findall(r"step (\d)/6", log) == ["5", "6"], "it goes on from step 4"
    assert (trained / "checkpoints" / "step-00000006" / "COMPLETE").is_file()
    assert files_of(folder / "dataset" / "target", folder / "dataset" / "mask", folder / "cache") == before

    (backup,) = (place / "backup").glob("????-*")
    assert not (place / OLD_CODE).exists()
    assert f"fluxfill retire --undo '{backup}'" in said
    run(*FLUXFILL, "retire", "--undo", backup, cwd=folder)
    assert (place / OLD_CODE).is_file()
