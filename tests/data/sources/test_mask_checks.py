import numpy as np
import pytest
from PIL import Image, ImageOps

from configs.data_schema import DataConfig
from configs.errors import InputError
from configs.mask_recipe import recipe_of
from data.samples.decode import load_pixels
from data.samples.geometry import Bucket, plan_crop
from data.samples.plan import PlannedSample
from data.sources.mask_checks import Fault, judge
from data.sources.problems import Findings
from data.sources.triples import list_triples
from tests.data.sources.made_pairs import SIZE, Pairs


def write_pairs(folder, count, change=lambda number, target, source, mask: (target, source, mask)):
    """Folders of pairs, each changed; returns what a config says of them."""
    pairs = Pairs()
    for number in range(count):
        pictures = change(number, *pairs.make(number))
        for role, picture in zip(("target", "source", "mask"), pictures, strict=True):
            (folder / role).mkdir(exist_ok=True)
            picture.save(folder / role / f"{number:02d}.png")
    return {"name": "pairs"} | {role: folder / role for role in ("target", "source", "mask")}


def list_found(folder, dataset):
    """What a scan finds in a dataset, and the recipe of its masks."""
    data = DataConfig.model_validate({"cache": folder / "cache", "datasets": [dataset]})
    findings = Findings()
    return list_triples(data.datasets[0], data, lambda count: None, findings), findings, data


def invert_first(wanted):
    return lambda number, target, source, mask: (target, source, ImageOps.invert(mask) if number < wanted else mask)


def test_faulty_pairs_are_refused_where_they_are_more_than_one_in_twenty_and_else_named(tmp_path):
    dataset = write_pairs(tmp_path, 40, invert_first(2))
    _, findings, _ = list_found(tmp_path, dataset)
    assert not findings.problems
    assert [note.where for note in findings.notes] == [str(tmp_path / f"mask/{number:02d}.png") for number in (0, 1)]
    assert {note.kind for note in findings.notes} == {"inverted masks"}
    ImageOps.invert(Image.open(tmp_path / "mask/30.png")).save(tmp_path / "mask/30.png")
    _, findings, _ = list_found(tmp_path, dataset)
    assert [problem.where[-6:-4] for problem in findings.problems] == ["00", "01", "30"]
    with pytest.raises(InputError, match="inverted: source and target differ only where it is black"):
        findings.raise_problems()


@pytest.mark.parametrize("policy, problems, notes", [("error", 4, 0), ("warn", 0, 4), ("off", 0, 0)])
def test_the_dataset_says_what_becomes_of_faulty_pairs(tmp_path, policy, problems, notes):
    dataset = write_pairs(tmp_path, 4, invert_first(4)) | {"check_masks": policy}
    _, findings, _ = list_found(tmp_path, dataset)
    assert (len(findings.problems), len(findings.notes)) == (problems, notes)


def test_a_second_scan_tells_the_same_and_reads_no_picture(tmp_path, monkeypatch):
    dataset = write_pairs(tmp_path, 4, invert_first(4))
    _, before, _ = list_found(tmp_path, dataset)
    monkeypatch.setattr("data.sources.scan.read_picture", None)
    _, after, _ = list_found(tmp_path, dataset)
    assert after.problems == before.problems
    assert len(before.problems) == 4


def test_a_mask_folder_that_is_the_picture_folder_is_refused(tmp_path):
    dataset = write_pairs(tmp_path, 3)
    _, findings, _ = list_found(tmp_path, dataset | {"mask": tmp_path / "target"})
    assert {problem.what for problem in findings.problems} == {"is the target's own file, no mask"}
    _, findings, _ = list_found(tmp_path, dataset | {"mask": tmp_path / "source", "source": None})
    assert len(findings.problems) == 3
    assert all("as in a photograph or a gradient" in problem.what for problem in findings.problems)


def test_label_masks_are_told_so_and_trained_on_by_their_label(tmp_path):
    dataset = write_pairs(tmp_path, 3, lambda number, *pictures: (*pictures[:2], pictures[2].point(lambda v: v // 255)))
    _, findings, _ = list_found(tmp_path, dataset | {"check_masks": "off"})
    assert len(findings.problems) == 3
    assert all("labels, not brightness" in problem.what for problem in findings.problems)
    assert all("`mask: {label: 1}`" in problem.cure for problem in findings.problems)
    triples, findings, data = list_found(tmp_path, dataset | {"mask": {"folder": tmp_path / "mask", "label": 1}})
    assert not findings.problems and not findings.notes
    (triple, size, _), bucket = triples[0], Bucket(SIZE[1], SIZE[0])
    sample = PlannedSample(triple, size, bucket, plan_crop(*size, bucket=bucket), "train", recipe_of(data.datasets[0]))
    (pixels,) = load_pixels(sample, data)
    assert np.array_equal(pixels.mask, np.asarray(Image.open(tmp_path / "mask/00.png")) == 1)


@pytest.mark.parametrize("size", [(96, 96), (96, 64)])
@pytest.mark.parametrize("role, orientation", [("target", 6), ("target", 3), ("mask", 8)])
def test_exif_that_turns_the_target_or_the_mask_alone_is_found(tmp_path, size, role, orientation):
    dataset = write_pairs(tmp_path, 1, lambda number, *pictures: [picture.resize(size, 0) for picture in pictures])
    path = tmp_path / role / "00.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)
    del dataset["source"]
    _, findings, _ = list_found(tmp_path, dataset)
    (problem,) = findings.problems
    assert problem.kind == "EXIF"
    of_mask = orientation if role == "mask" else 1
    assert f"EXIF turns the mask (orientation {of_mask}) otherwise than its target" in problem.what
    _, findings, _ = list_found(tmp_path, dataset | {"check_masks": "warn"})
    assert bool(findings.problems) == (size[0] != size[1] and orientation != 3)  # then they are of two sizes


def test_a_source_shows_that_a_mask_of_the_upright_target_is_right(tmp_path):
    dataset = write_pairs(tmp_path, 1, lambda number, *pictures: [picture.resize((96, 96), 0) for picture in pictures])
    exif = Image.Exif()
    exif[0x0112] = 6
    for role in ("target", "source"):
        path = tmp_path / role / "00.png"
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    _, findings, _ = list_found(tmp_path, dataset)
    assert not findings.problems
    mask = tmp_path / "mask/00.png"
    Image.open(mask).transpose(Image.Transpose.ROTATE_90).save(mask)  # made of the stored one
    _, findings, _ = list_found(tmp_path, dataset)
    assert [problem.kind for problem in findings.problems] == ["EXIF"]


def test_a_few_pairs_that_look_swapped_are_an_accident():
    fault = Fault("swapped", "look swapped")
    for num_pairs, num_faults, told in ((100, 9, 0), (100, 10, 10), (6, 2, 0), (6, 3, 3)):
        findings = Findings()
        judge([(f"{number}.png", fault) for number in range(num_faults)], num_pairs, "error", findings)
        assert (len(findings.problems), len(findings.notes)) == (told, 0)
